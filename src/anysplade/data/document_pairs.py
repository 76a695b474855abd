"""Training pairs from documents alone: title and text, heading and section, a sentence and the rest of its document."""

import hashlib
import html
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from anysplade._common.files import write_whole
from anysplade._common.provenance import provenance
from anysplade.data.collections import Document, empty_corpus, iter_corpus
from anysplade.data.sources import whole_characters
from anysplade.errors import DataError, OptionError, OutputError

Kind = Literal["title", "heading", "sentence"]

KINDS: tuple[Kind, ...] = get_args(Kind)

_QUERY = (1, 40)  # words of a title or heading
_SENTENCE = (5, 40)  # words of a sentence
_SPAN = (6, 15)  # words of a span, of a text without sentences
_POSITIVE = 8  # words of a positive at least
_LETTERS = 0.75  # of a sentence's characters, white space included: tables have fewer
_MARKS = 0.03  # of a sentence's characters at most are marks of code
_SHOWN = 3

# Scripts without spaces between words: a character counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uac00-\ud7ff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+|(?<=[。！？])|\n\s*\n|\"{3}|'{3}")
_CODE = re.compile(r"[(){}\[\]<>=_|\\;:@]")
_MARKDOWN = re.compile(r" {0,3}#{1,6}\s+(.+?)\s*#*\s*$")
_UNDERLINE = re.compile(r"\s*([=\-~^\"'`#*+.:_])\1{2,}\s*$")
_HTML = re.compile(r"\s*<h[1-6][^>]*>(.+?)</h[1-6]>\s*$", re.IGNORECASE)


class _Row(NamedTuple):
    query: str
    positive: str
    kind: Kind
    document_id: str


@dataclass(frozen=True)
class MadePairs:
    """What ``make_pairs`` made; lies beside the pairs, in ``OUTPUT.json``."""

    pairs: dict[str, int]  # by kind
    documents: int  # read
    near_duplicates: int  # documents left out, whose text is nearly that of one before
    ambiguous: int  # pairs left out, since another document has the same query
    without: int  # documents left without a pair: too short, or without what the kinds need
    examples: list[dict[str, str]]  # three of the pairs
    data_hash: str  # SHA-256 of the corpus
    options: dict[str, Any]
    provenance: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_pairs(corpus: str, output: str | Path, *, kinds: Sequence[str] = KINDS, progress: bool = False) -> MadePairs:
    """Make training pairs from the documents of a corpus, without labels; the same corpus gives the same pairs.

    ``title``: a title, and the text without it. ``heading``: a heading of Markdown, reStructuredText or HTML, and its section.
    ``sentence``: one sentence, chosen by the hash of the document, and the document without it (the inverse cloze task, arXiv
    1906.00300); of a text without sentences a few words in a row. Documents whose text is nearly that of one before are left
    out (about two thirds of their shingles of three words are the same), and pairs whose query occurs in several documents, such as
    "Introduction": it names none of them.

    Args:
        corpus: anything that can be indexed.
        output: a JSONL file of ``query``, ``positive``, ``kind`` and ``document_id``, which ``train`` reads.
        kinds: of pairs.
        progress: show a progress bar where the corpus has one.

    Raises:
        OptionError: an unknown kind, or none.
        DataError: no pair can be made of the corpus.
        OutputError: the output exists and was made from another corpus or with other kinds.
    """
    chosen = [kind for kind in KINDS if kind in kinds]
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not chosen:
        raise OptionError(f"kinds: {unknown[0] if unknown else 'none'}; choose from {', '.join(KINDS)}")
    output = Path(output).expanduser()
    record = output.with_name(f"{output.name}.json")
    digest, seen, rows = hashlib.sha256(), _NearDuplicates(), list[_Row]()
    documents = near = without = 0
    for id_, document in iter_corpus(corpus, progress=progress):
        documents += 1
        digest.update(json.dumps([id_, document.title, document.text]).encode())
        if seen.has(document.full_text):
            near += 1
            continue
        made = list(dict.fromkeys(row for kind in chosen for row in _MAKERS[kind](id_, document)))
        without += not made
        rows += made
    if not documents:
        raise empty_corpus(corpus)
    options = {"corpus": corpus, "kinds": chosen}
    finished = _finished(output, record, {"data_hash": digest.hexdigest(), "options": options})
    if finished is not None:
        return finished
    places: dict[str, set[str]] = {}
    for row in rows:
        places.setdefault(_normal(row.query), set()).add(row.document_id)
    kept = [row for row in rows if len(places[_normal(row.query)]) == 1]
    if not kept:
        why = "other documents have the same queries" if rows else "texts are too short, or lack what the kinds need"
        raise DataError(f"{corpus}: no pair of {', '.join(chosen)} from {documents:,} documents: {why}; choose other kinds")
    shown = [kept[(2 * i + 1) * len(kept) // (2 * _SHOWN)] for i in range(_SHOWN)]
    counts = Counter(row.kind for row in kept)
    result = MadePairs(
        pairs={kind: counts[kind] for kind in chosen},
        documents=documents,
        near_duplicates=near,
        ambiguous=len(rows) - len(kept),
        without=without,
        examples=[row._asdict() for row in dict.fromkeys(shown)],
        data_hash=digest.hexdigest(),
        options=options,
        provenance=provenance(),
    )
    write_whole(output, "".join(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in kept))
    write_whole(record, json.dumps(result.to_dict(), indent=2) + "\n")
    return result


def _finished(output: Path, record: Path, about: dict[str, Any]) -> MadePairs | None:
    """What was recorded, if the output was made from the same corpus in the same way."""
    if not output.exists():
        return None
    known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if {name: known.get(name) for name in about} != about:
        raise OutputError(f"{output}: exists and was not made from the same corpus and kinds; choose another `output`")
    return MadePairs(**{field.name: known[field.name] for field in fields(MadePairs)})


# ------------------------------------------------------------------------------------------- kinds


def _titles(id_: str, document: Document) -> Iterator[_Row]:
    title = _line(document.title)
    text = document.text.strip()
    if title and text.startswith(title):
        text = text[len(title) :].lstrip(" .:-–\n")
    if _is_query(title) and _words(text) >= _POSITIVE:
        yield _Row(title, _line(text), "title", id_)


def _headings(id_: str, document: Document) -> Iterator[_Row]:
    lines = [*document.text.splitlines(), ""]
    heading, section = "", list[str]()

    def row() -> Iterator[_Row]:
        text = _line(" ".join(section))
        if _is_query(heading) and _words(text) >= _POSITIVE:
            yield _Row(heading, text, "heading", id_)

    skip = False
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if skip:
            skip = False
            continue
        marked = _MARKDOWN.match(line) or _HTML.match(line)
        underlined = bool(line.strip()) and bool(_UNDERLINE.match(after)) and 2 * len(after.strip()) >= len(line.strip())
        if marked or (underlined and not _UNDERLINE.match(line)):
            yield from row()
            heading, section, skip = _line(_plain(marked[1]) if marked else line), [], not marked
        else:
            section.append(line)
    yield from row()


def _sentences(id_: str, document: Document) -> Iterator[_Row]:
    text = document.text.strip()
    spans = _sentence_spans(text) or _word_spans(text, id_)
    good = [(start, end) for start, end in spans if _words(text[:start]) + _words(text[end:]) >= _POSITIVE]
    if good:
        start, end = good[_draw(id_, text) % len(good)]
        rest = _line(Document(document.title, f"{text[:start]} {text[end:]}").full_text)
        yield _Row(_line(text[start:end]).strip("\"' "), rest, "sentence", id_)


_MAKERS = {"title": _titles, "heading": _headings, "sentence": _sentences}


def _sentence_spans(text: str) -> list[tuple[int, int]]:
    """Where the sentences of natural language stand in a text; none if it is all one sentence."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    spans = list(zip([0, *ends], [*ends, len(text)], strict=True))
    return [span for span in spans if len(spans) > 1 and _is_sentence(text[slice(*span)])]


def _word_spans(text: str, id_: str) -> list[tuple[int, int]]:
    """One span of a few words in a row, chosen by the hash of the document."""
    words = list(_WORD.finditer(text))
    draw = _draw(text, id_)
    length = _SPAN[0] + draw % (_SPAN[1] - _SPAN[0] + 1)
    if len(words) < length + _POSITIVE:
        return []
    first = (draw >> 16) % (len(words) - length + 1)
    span = words[first].start(), words[first + length - 1].end()
    return [span] if _share_of_letters(text[slice(*span)]) >= _LETTERS else []


def _is_sentence(text: str) -> bool:
    text = text.strip()
    language = _share_of_letters(text) >= _LETTERS and len(_CODE.findall(text)) <= _MARKS * len(text)
    return language and _SENTENCE[0] <= _words(text) <= _SENTENCE[1]


def _share_of_letters(text: str) -> float:
    return sum(character.isalpha() or character.isspace() for character in text) / max(1, len(text))


def _is_query(text: str) -> bool:
    return _QUERY[0] <= _words(text) <= _QUERY[1] and any(map(str.isalpha, text))


def _words(text: str) -> int:
    return sum(1 for _ in _WORD.finditer(text))


def _line(text: str) -> str:
    return " ".join(whole_characters(text).split())


def _plain(text: str) -> str:
    """Without tags and entities of HTML and emphasis of Markdown."""
    return html.unescape(re.sub(r"<[^>]+>|[*_`]{1,3}(?=\S)|(?<=\S)[*_`]{1,3}", "", text))


def _normal(query: str) -> str:
    return " ".join(_WORD.findall(query.casefold()))


def _draw(*parts: str) -> int:
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest(), "big")


# --------------------------------------------------------------------------------- near-duplicates


class _NearDuplicates:
    """Texts seen before, by MinHash (Broder 1997): 16 smallest hashes of shingles of three words, in 4 bands of 4.

    Two texts are taken for the same if all hashes of a band agree, as they do half of the time where 0.64 of the shingles are
    common, and nearly always at 0.9. Memory: 4 hashes of 8 bytes a text.
    """

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self._factors = generator.integers(1, 2**63, (16, 1), dtype=np.uint64) | np.uint64(1)
        self._bands: set[int] = set()

    def has(self, text: str) -> bool:
        """Whether a text like this one came before; from now on this one did. A text without words is like no other."""
        words = np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in _WORD.findall(text.casefold())], np.uint64)
        if not len(words):
            return False
        padded = np.concatenate([words, np.zeros(max(0, 3 - len(words)), np.uint64)])
        shingles = (padded[:-2] * np.uint64(0x9E3779B97F4A7C15) + padded[1:-1]) * np.uint64(0xC2B2AE3D27D4EB4F) + padded[2:]
        shingles = np.unique(shingles ^ (shingles >> np.uint64(29)))
        parts = np.array_split(shingles, 1 + len(shingles) // 4096)
        smallest = np.min([(part * self._factors).min(axis=1) for part in parts], axis=0)
        bands = [hash((i, band.tobytes())) for i, band in enumerate(smallest.reshape(4, 4))]
        known = any(band in self._bands for band in bands)
        if not known:
            self._bands.update(bands)
        return known
