"""The languages that BM25 has a stemmer or stop words for, their names, and which of them texts are in."""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import chain

from anysplade._common.arguments import did_you_mean, require
from anysplade._common.extras import extra
from anysplade.errors import OptionError

with extra("search"):
    import Stemmer
    from bm25s import stopwords

AUTO, NONE = "auto", "none"  # the language of the texts; no stemmer and no stop words

# fmt: off
_NAMES = {  # by ISO 639-1 code
    "ar": "arabic", "hy": "armenian", "eu": "basque", "ca": "catalan", "zh": "chinese", "cs": "czech", "da": "danish",
    "nl": "dutch", "en": "english", "eo": "esperanto", "et": "estonian", "fi": "finnish", "fr": "french", "de": "german",
    "el": "greek", "hi": "hindi", "hu": "hungarian", "id": "indonesian", "ga": "irish", "it": "italian", "ko": "korean",
    "lt": "lithuanian", "ne": "nepali", "no": "norwegian", "nb": "norwegian", "nn": "norwegian", "fa": "persian",
    "pl": "polish", "pt": "portuguese", "ro": "romanian", "ru": "russian", "sr": "serbian", "st": "sesotho", "es": "spanish",
    "sv": "swedish", "ta": "tamil", "tr": "turkish", "yi": "yiddish",
}
# fmt: on

# Frequent words, also those shared with related languages, of languages for which bm25s has no list: they serve to recognize a
# language, and those without a stemmer to tell it from a relative that has one.
_FREQUENT = {
    "arabic": "من في على إلى الى أن ان التي لا هذا عن الذي هذه ما مع كان أو كما هو هي",
    "basque": "eta da ez ere dira bat du izan zen dute edo den baina dago zuen",
    "bulgarian": "на да се не за от са по като това който ще или във със при но че има той",
    "catalan": "de la el que en un una per si es no se les del als amb els dels al ha més com és aquest van",
    "czech": "se na je že do pro za nebo jako by není při pod po ve ze od aby tak ale jsou byl jeho byla",
    "esperanto": "la de kaj en estas ne al por ĉu kun esti tiu estis pri kiu el ĝi li ke",
    "estonian": "ja on ei et see kui ka oli või mis seda kes aga ning selle pole",
    "finnish": "ja on ei että se oli mutta tai ovat kun joka mukaan kuin myös niin olla jos ole hän sen",
    "galician": "de non unha un dos para que ao das como do da se en os as co na no foi nun máis polo ou",
    "hindi": "के में है की से को का और पर नहीं यह एक हैं ने कि लिए था इस भी कर",
    "hungarian": "az és hogy nem egy is meg volt csak ha vagy ez mint el de még ki már azt",
    "indonesian": "yang dan di untuk dengan dari tidak ini itu pada dalam adalah ke oleh juga akan atau sebagai",
    "lithuanian": "ir yra kad su iš tai kaip į bet nuo ne ar buvo po tik apie dėl",
    "macedonian": "на да се не за од со во што како ќе или ги до по има но тоа дека бил",
    "marathi": "आहे आणि या व हे त्या ते हा नाही होते मध्ये आहेत ही होता तर की",
    "nepali": "छ को मा र हो लाई यो छैन गर्न भएको एक पनि गर्नुहोस् र छन् ले थियो",
    "persian": "از به که در این را با است برای یک آن می های بود شد خود تا بر ها شده نیست",
    "polish": "nie na się do jest to że od za lub przez jak dla po ale co czy są był jego oraz",
    "romanian": "și în nu la cu un pe este pentru din să sau fi de care ce mai se lui al dar sunt au",
    "serbian": "је да се на за са од не који као није по или су што то из je da se na za sa od koji kao nije po ili su što iz",
    "slovak": "sa na je že do pre za alebo ako by nie je pri pod po vo zo od aby tak ale sú bol jeho bola",
    "slovene": "se na je da ne za ali kot ki ni pri po pod iz od tudi so bil bila ter še sem",
    "ukrainian": "на не що та для це або як від за до є із про був але при його які з по",
    "urdu": "کے میں ہے کی سے کو کا اور پر نہیں یہ ایک ہیں نے کہ لیے تھا اس بھی کر",
}
# Combining marks, as in Hindi, Tamil or decomposed Latin, belong to the letter before them, but are not in \w.
_MARKS = "".join(mark for mark in map(chr, range(0x300, 0x20000)) if unicodedata.category(mark) in ("Mn", "Mc"))
WORD = rf"(?:\w[{_MARKS}]*){{2,}}"  # the default of bm25s (two letters), with marks
_WORD = re.compile(WORD)
_OF_SCRIPTS = {"HANGUL": "korean", "GREEK": "greek", "ARMENIAN": "armenian", "TAMIL": "tamil"}  # that write one language
_KANA = 0.02  # share of Hiragana and Katakana in the letters of a text that is Japanese
_SAMPLE, _LENGTH = 1000, 500  # texts to read, and characters of each
_ENOUGH, _FAR = 0.04, 1.15  # smallest share of frequent words in a text, and the factor by which it exceeds the next language's
_ENOUGH_LONG, _ENOUGH_ENGLISH = 0.07, 0.03  # the same for the longer lists of bm25s, and for English, which is also in source code


def language_name(language: str) -> str:
    """The name of a language by its English name or ISO 639-1 code, in any case, "none" or "auto"; otherwise an OptionError."""
    require("language", language, str, f"give a name or a code, {AUTO!r} or {NONE!r}")
    names = sorted(_algorithms() | _lists().keys())
    known = {name: name for name in (AUTO, NONE, *names)} | {code: name for code, name in _NAMES.items() if name in names}
    if language.lower() not in known:
        hint = did_you_mean(language, known, 0.7)
        raise OptionError(
            f"`language` is {language!r}: BM25 has no stemmer and no stop words for it{hint or '; '}"
            f"{' else ' if hint else ''}give {AUTO!r}, {NONE!r} or one of {', '.join(names)}"
        )
    return known[language.lower()]


def stop_words(language: str) -> list[str]:
    """The stop words of a language by its name, from bm25s; empty if it has no list."""
    return sorted(_lists().get(language, ()))


def stemmer(language: str) -> "Stemmer.Stemmer | None":
    """The stemmer of a language by its name, Porter's for English and otherwise Snowball's; None if there is none."""
    return Stemmer.Stemmer("porter" if language == "english" else language) if language in _algorithms() else None


def detect_language(texts: Sequence[str]) -> str:
    """The name of the language that texts are in, "none" if it is not clear or has neither a stemmer nor stop words.

    Up to 1,000 texts, evenly spread, are read. A script that writes one language decides; otherwise the share of each language's
    frequent words does, a word that several have counting in parts.
    """
    sample = [unicodedata.normalize("NFC", text[:_LENGTH]).lower() for text in texts[:: -(-len(texts) // _SAMPLE) or 1]]
    if (written := _by_script(sample)) is not None:
        return written
    shares = _shares(sample)
    (most, first), (second, _), *_ = sorted(((share, name) for name, share in shares.items()), reverse=True) + [(0.0, NONE)] * 2
    enough = _ENOUGH_ENGLISH if first == "english" else _ENOUGH_LONG if first in _lists() else _ENOUGH
    known = first in _lists() or first in _algorithms()
    return first if known and most >= max(enough, _FAR * second) else NONE


def _by_script(texts: Sequence[str]) -> str | None:
    """The language by the script of most letters; None if the script writes several."""
    scripts: Counter[str] = Counter()
    for letter, count in Counter(chain.from_iterable(texts)).items():
        if letter.isalpha():
            scripts[unicodedata.name(letter, "").partition(" ")[0]] += count
    kana = scripts["HIRAGANA"] + scripts["KATAKANA"]
    east = kana + scripts["CJK"]
    if 2 * east > scripts.total():
        return NONE if kana > _KANA * east else "chinese"
    script, count = max(scripts.items(), key=lambda item: item[1], default=("", 0))
    return _OF_SCRIPTS.get(script) if 2 * count > scripts.total() else None


def _shares(texts: Sequence[str]) -> dict[str, float]:
    """The share of each language's frequent words in the words of texts."""
    languages: dict[str, list[str]] = {}
    for language, words in _word_lists().items():
        for word in words:
            languages.setdefault(word, []).append(language)
    counts = Counter(chain.from_iterable(map(_WORD.findall, texts)))
    shares: dict[str, float] = {}
    for word in languages.keys() & counts.keys():
        for language in languages[word]:
            shares[language] = shares.get(language, 0) + counts[word] / len(languages[word]) / counts.total()
    return shares


@functools.cache
def _word_lists() -> dict[str, frozenset[str]]:
    """The frequent words of each language."""
    lists = _lists() | {"english": frozenset(stopwords.STOPWORDS_EN_PLUS)}  # the other is much shorter than other languages'
    return lists | {language: frozenset(words.split()) for language, words in _FREQUENT.items()}


@functools.cache
def _lists() -> dict[str, frozenset[str]]:
    """The stop words of bm25s by the name of the language."""
    found = {name.removeprefix("STOPWORDS_").lower(): words for name, words in vars(stopwords).items() if name.isupper()}
    lists = {name: frozenset(found[name]) for name in set(_NAMES.values()) & found.keys()}
    return lists | {"english": frozenset(stopwords.STOPWORDS_EN)}


@functools.cache
def _algorithms() -> frozenset[str]:
    """Languages with a stemmer in the installed version of PyStemmer."""
    return frozenset(Stemmer.algorithms()) & set(_NAMES.values())
