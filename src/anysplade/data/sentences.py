"""Sentences that can stand for queries: a document's most suitable sentence, and the document without it."""

# Not sentencex, which is fast: 40 % of the usable sentences that it finds in 1,000 docstrings run across headings, lists or code.

import re
import unicodedata
from collections.abc import Iterator
from itertools import islice

from anysplade.data.corpus import Document
from anysplade.data.text import TOKEN, UNSPACED_CHARACTER, count_words, normalized, stable_hash

MIN_POSITIVE_WORDS = 8
_SENTENCE_WORDS = (4, 40)
_PART_WORDS = (6, 15)  # of the part that stands for a sentence in a text that has none
_TRIED = 20  # sentences per document, until one is found that occurs once

# Sentences end at an "end" and never continue past a "wall": a blank or indented line, a list, a mark of code.
_BOUNDARY = re.compile(
    r"""(?x) (?P<end> [.!?…؟۔।]+ (?: (?= \"{3} | '{3} ) | ["'”’)\]]* (?=\s) ) | [。！？｡]+ ["」』”’）]* )
    | (?P<wall> \n [ \t]* (?= \n | [-*+•>|\#] | \d+[.)]\s | :\w+ ) | \n (?= [ \t]+ \S | [\w*,\ ]{1,40}[ ]: ) | (?<=:) \n
        | \"{3} | '{3} | `{3} | >>>[^\n]* | -{3,} | ={3,} | ~{3,} | /\*+ | \*+/ | (?<!:)//
        | [:@] (?: param | type | returns? | rtype | raises? | throws ) \b
        | (?: Args | Arguments | Returns? | Raises | Yields | Examples? | Parameters | Usage | Notes? ) \s* : )"""
)
_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|etc|cf|vs|al|approx|Dr|Mr|Mrs|Ms|Prof|St|Fig|Eq|No|Vol|pp|ed)|\b[A-Z])\.\Z")
_SYMBOL = re.compile(r"[_=<>{}\[\]|\\`^~*/@#$%&+;]|\w\(|\w\.\w|\b(?:def|self)\b|\"|\d")
_WHOLE = re.compile(  # a sentence, not a piece of one or a "name : description"
    r"""(?!(?:\S+[ ]?){1,3}:\s)(?s:.)*[.!?…؟۔।。！？｡]["'”’)\]」』）]*"""
)
_LEADING = re.compile(r"[\s\-*+•>#|:.,;]*(?:\d+[.)]\s+)?")  # marks of lists and quotations


def sentence_pair(id_: str, document: Document) -> tuple[str, str] | None:
    """A sentence of a document, and the document without it; None if there is no suitable sentence.

    The sentences are tried in the order of a hash, whole sentences before others. A text that is a single sentence or has no
    punctuation gives a part.
    """
    text = document.text
    spans = list(_sentences(text))
    order = [
        (not _WHOLE.fullmatch(text, start, end), stable_hash(f"{id_}\n{start}"), start, end)
        for start, end in spans
        if _is_informative(text[start:end])
    ]
    if len(spans) == 1 and (part := _part(id_, text, *spans[0])):
        order.append((True, 2**64, *part))
    for *_, start, end in islice(sorted(order), _TRIED):
        query, rest = " ".join(text[start:end].split()), f"{text[:start].rstrip()} {text[end:].lstrip()}".strip()
        positive = Document(document.title, rest).full_text
        if count_words(rest) >= MIN_POSITIVE_WORDS and normalized(query) not in " ".join(positive.casefold().split()):
            return query, positive
    return None


def _sentences(text: str) -> Iterator[tuple[int, int]]:
    """The start and end of each sentence in a text."""
    has_capitals = text != text.lower()
    start = 0
    for found in [*_BOUNDARY.finditer(text), None]:
        end = len(text) if found is None else found.end() if found["end"] else found.start()
        if found and found["end"] and found["end"][0] == ".":
            following = text[end : end + 40].lstrip()[:1]
            if (has_capitals and following.islower()) or _ABBREVIATION.search(text[max(start, end - 8) : end]):
                continue
        begin = _LEADING.match(text, start, end)
        begun = begin.end() if begin else start
        last = begun + len(text[begun:end].rstrip())
        if last > begun:
            yield begun, last
        start = end if found is None else found.end()


def _is_prose(sentence: str) -> bool:
    """Whether at most one in 25 characters is a digit or a mark of code."""
    return 25 * len(_SYMBOL.findall(sentence)) <= len(sentence)


def _is_informative(sentence: str) -> bool:
    """Whether a sentence has the length of a query, is not code, and has three different words of three letters or more."""
    words = {word for word in re.findall(r"[^\W\d_]+", sentence.casefold()) if len(word) >= 3}
    long_enough = len(words) >= 3 or len(set(UNSPACED_CHARACTER.findall(sentence))) >= 6
    return long_enough and _SENTENCE_WORDS[0] <= count_words(sentence) <= _SENTENCE_WORDS[1] and _is_prose(sentence)


def _part(id_: str, text: str, start: int, end: int) -> tuple[int, int] | None:
    """The start and end of a part of a text, chosen by a hash."""
    if not _is_prose(text[start:end]):
        return None
    tokens = list(TOKEN.finditer(text, start, end))
    per_word = max(1, round(len(tokens) / max(count_words(text[start:end]), 1)))  # 2 in a script without spaces
    least, most = (count * per_word for count in _PART_WORDS)
    chosen = stable_hash(f"{id_}\npart")
    length = min(least + chosen % (most - least + 1), len(tokens) - MIN_POSITIVE_WORDS * per_word)
    if length < least:
        return None
    starts = [(chosen >> 8 * i) % (len(tokens) - length + 1) for i in range(2, 6)]
    # The longest of four parts with the same number of words has the fewest short words such as "of" and "the".
    begin, stop = max(((tokens[i].start(), tokens[i + length - 1].end()) for i in starts), key=lambda span: span[1] - span[0])
    while begin < stop and unicodedata.category(text[begin]).startswith("M"):  # a vowel sign stays with its letter
        begin += 1
    while stop < end and unicodedata.category(text[stop]).startswith("M"):
        stop += 1
    return begin, stop
