"""Training pairs made from documents alone, for a corpus that has no queries.

A title, a heading or a sentence stands for the query, and the text that it belongs to for the document that answers it. The
sentence pairs are the inverse cloze task (Lee et al., arXiv 1906.00300). Nothing is random: a corpus always gives the same pairs.
"""

import hashlib
import html
import json
import re
import tempfile
import unicodedata
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from anysplade._common.files import file_digest, finished_record, record_path, user_path, whole_file, write_atomic
from anysplade._common.hashing import DataHash
from anysplade._common.progress import bar
from anysplade._common.provenance import provenance
from anysplade._common.tables import Tabular
from anysplade.data.collections import Document, empty_corpus, iter_corpus
from anysplade.data.scripts import UNSPACED
from anysplade.data.sources import replace_surrogates
from anysplade.errors import DataError, OptionError

KINDS: tuple[str, ...] = ("title", "heading", "sentence")

_SENTENCE_WORDS = (4, 40)
_SPAN_WORDS = (6, 15)  # of the part that stands for a sentence in a text without any
_QUERY_WORDS = 40  # a longer title or heading is none
_POSITIVE_WORDS = 8  # at least
_TRIED = 20  # sentences of a document, until one is found that occurs once
_SHOWN = 300  # characters of an example's texts in the record

# Headings that say nothing of their text, also where only one document has them.
_GENERIC = frozenset(
    re.split(
        r",\s+",
        """untitled, no title, title, home, index, contents, table of contents, abstract, introduction, overview, summary,
        background, conclusion, conclusions, discussion, results, methods, references, bibliography, further reading,
        external links, see also, links, notes, note, remarks, appendix, acknowledgements, acknowledgments, faq, example,
        examples, usage, parameters, other parameters, arguments, args, options, returns, return, yields, raises, warns,
        warnings, attributes, properties, description, details, license, changelog, todo""",
    )
)


@dataclass(frozen=True, repr=False)
class MadePairs(Tabular):
    """The record that ``make_pairs`` writes beside the JSONL, to ``OUTPUT.json``."""

    pairs: dict[str, int]  # written, by kind
    documents: int  # read
    left_out: dict[str, dict[str, int]]  # how many documents, or pairs of a kind, by the reason
    examples: list[dict[str, str]]  # three rows of the JSONL, of different kinds if there are any; long texts are cut
    about: dict[str, Any]  # options, hash of the data, provenance

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "about"} | self.about

    def _rows(self) -> list[dict[str, Any]]:
        """How many pairs of each kind."""
        return [{"kind": kind, "pairs": count} for kind, count in self.pairs.items()]


def make_pairs(corpus: str, output: str | Path, *, kinds: Sequence[str] = KINDS, progress: bool = False) -> MadePairs:
    """Make training pairs from the documents of a corpus, without any query.

    The kinds of pairs:

    - ``"title"``: a document's title, and its text
    - ``"heading"``: a heading in the text (Markdown, underlined as in reStructuredText, HTML), and the text up to the next one
    - ``"sentence"``: one sentence of 4 to 40 words, and the document without it; a text without sentences gives a
      part of 6 to 15 words. A hash of the document's id chooses it. Sentences of code are not taken

    In scripts without spaces two characters count as a word. Left out, and counted by reason, are:

    - near-duplicates of an earlier document, which would be wrong negatives of each other: texts of which about 70 % or more
      of the runs of three words are the same (Jaccard similarity, estimated from 64 MinHash values of the first 2,000 words)
    - queries that stand for more than one text, in capitals or not, and headings such as "Introduction"
    - titles and headings of more than 40 words, and texts of less than 8

    Args:
        corpus: any source of ``read_corpus``.
        output: a JSONL file with ``query``, ``positive``, ``kind`` and ``document_id``, which ``read_pairs`` reads. It is
            written at once when all is made; one that was made from the same corpus and options is not made again.
        kinds: of pairs to make.

    Raises:
        OptionError: an unknown kind, or none.
        OutputError: the output exists and was made in another way, or cannot be written.
        DataError: no pair can be made, or as ``read_corpus`` raises it.
    """
    if not kinds or not set(kinds) <= set(KINDS):
        unknown = ", ".join(repr(kind) for kind in kinds if kind not in KINDS) or "none"
        raise OptionError(f"`kinds`: {unknown}; choose of {', '.join(KINDS)}")
    output = user_path(output)
    options: dict[str, Any] = {"corpus": str(corpus), "kinds": [kind for kind in KINDS if kind in kinds]}
    digest = DataHash()
    watched = _hashed(iter_corpus(corpus, progress=progress), digest, progress)
    if output.exists():
        for _ in watched:
            pass
        before = finished_record(output, options | {"data_hash": digest.hexdigest()})
        if before is not None:
            return MadePairs(**{field.name: before.pop(field.name) for field in fields(MadePairs)[:-1]}, about=before)
    with whole_file(output) as file, tempfile.TemporaryFile(dir=output.parent) as candidates:
        # Which of them stay is known at the end; until then only these few numbers of each are in memory.
        numbers, queries, kind_of = array("q"), array("Q"), array("B")  # document, hash of the query, kind
        signatures = bytearray()
        left_out = {part: Counter[str]() for part in ("document", *options["kinds"])}
        read = with_text = 0
        for id_, document in watched:
            read += 1
            title, text = (replace_surrogates(part) for part in document[:2])
            if not _size(text):
                left_out["document"]["without_text"] += 1
                continue
            for kind, query, positive in _pairs(id_, Document(title, text), options["kinds"], left_out):
                row = {"query": query, "positive": positive, "kind": kind, "document_id": id_}
                candidates.write(replace_surrogates(json.dumps(row, ensure_ascii=False)).encode() + b"\n")
                numbers.append(with_text)
                queries.append(_hash(_normal(query)))
                kind_of.append(KINDS.index(kind))
            signatures += _signature(text).tobytes()
            with_text += 1
        if not read:
            raise empty_corpus(corpus)
        duplicate = _near_duplicates(np.frombuffer(signatures, np.uint16).reshape(-1, _HASHES))
        kept = ~duplicate[np.asarray(numbers)]
        _, inverse, counts = np.unique(np.asarray(queries)[kept], return_inverse=True, return_counts=True)
        shared = np.zeros(len(kept), bool)
        shared[kept] = counts[inverse] > 1
        by_kind = {kind: np.asarray(kind_of) == KINDS.index(kind) for kind in options["kinds"]}
        left_out["document"]["near_duplicates"] = int(duplicate.sum())
        for kind, is_kind in by_kind.items():
            left_out[kind]["query_of_several_texts"] = int((shared & is_kind).sum())
        kept &= ~shared
        reasons = {part: {reason: count for reason, count in counted.items() if count} for part, counted in left_out.items()}
        if not kept.any():
            raise DataError(_no_pair(corpus, read, reasons))
        first = [int(np.argmax(kept & is_kind)) for is_kind in by_kind.values() if (kept & is_kind).any()]
        shown = list(dict.fromkeys([*first, *map(int, np.flatnonzero(kept)[:3])]))[:3]
        examples: dict[int, dict[str, str]] = {}
        candidates.seek(0)
        for i, line in enumerate(candidates):
            if kept[i]:
                file.write(line)
                if i in shown:
                    examples[i] = {name: _cut(value) for name, value in json.loads(line).items()}
        file.flush()
        made = MadePairs(
            {kind: int((kept & is_kind).sum()) for kind, is_kind in by_kind.items()},
            read,
            reasons,
            [examples[i] for i in shown],
            options | {"data_hash": digest.hexdigest(), "sha256": file_digest(Path(file.name)), "provenance": provenance()},
        )
        write_atomic(record_path(output), json.dumps(made.to_dict(), indent=2) + "\n")  # before the output: alone it says nothing
    return made


def _hashed(documents: Iterable[tuple[str, Document]], digest: DataHash, progress: bool) -> Iterator[tuple[str, Document]]:
    """The documents as they are, each added to the digest when it is read."""
    with bar("making pairs", "document", show=progress) as shown:
        for id_, document in documents:
            digest.add((id_, document.title, document.text))
            yield id_, document
            shown.update()


def _no_pair(corpus: str, read: int, reasons: dict[str, dict[str, int]]) -> str:
    """The message where all is left out: why, and what to do."""
    found = [f"{count:,} {reason.replace('_', ' ')}" for counted in reasons.values() for reason, count in counted.items()]
    others = [kind for kind in KINDS if kind not in reasons]
    fix = f"try other `kinds`: {', '.join(others)}" if others else "give a corpus with titles, or with longer texts"
    return f"{corpus}: none of {read:,} documents gave a pair ({', '.join(found)}); {fix}"


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _hash(text: str) -> int:
    """64 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(replace_surrogates(text).encode(), digest_size=8).digest())


# ---------------------------------------------------------------------------------- words and lengths

_TOKEN = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
_UNSPACED_CHARACTER = re.compile(rf"[{UNSPACED}]")
_MARKS = " \t\n.,:;!?…。、！？：；()[]\"'“”‘’「」"  # around a word or a query, without meaning


def _size(text: str) -> float:
    """Words: tokens with a letter or digit; a character of a script without spaces is half a word."""
    words = [token for token in _TOKEN.findall(text) if any(map(str.isalnum, token))]
    return len(words) - sum(1 for word in words if _UNSPACED_CHARACTER.match(word)) / 2


def _normal(text: str) -> str:
    """A text in small letters and single spaces, without the marks around it: what makes two queries the same."""
    return " ".join(text.casefold().split()).strip(_MARKS)


# ------------------------------------------------------------------------------------ pairs of a document


def _pairs(id_: str, document: Document, kinds: Sequence[str], left_out: dict[str, Counter[str]]) -> Iterator[tuple[str, str, str]]:
    """Kind, query and positive of each pair of a document; what gives none is counted in ``left_out``."""
    title, text = document.title, document.text
    if "title" in kinds:
        if not title.strip():
            left_out["title"]["without_title"] += 1
        elif reason := _unusable(title, body := _without_title(title, text)):
            left_out["title"][reason] += 1
        else:
            yield "title", " ".join(title.split()), body
    if "heading" in kinds:
        sections = list(_sections(text))
        left_out["heading"]["without_heading"] += not sections
        for heading, body in sections:
            if reason := "same_as_title" if _normal(heading) == _normal(title) else _unusable(heading, body):
                left_out["heading"][reason] += 1
            else:
                yield "heading", heading, body
    if "sentence" in kinds:
        found = _sentence_pair(id_, document)
        if found is None:
            left_out["sentence"]["without_sentence"] += 1
        else:
            yield "sentence", *found


def _unusable(heading: str, body: str) -> str:
    """Why a title or heading with its text is no pair; empty if it is one."""
    if _normal(heading) in _GENERIC or not any(map(str.isalpha, heading)):
        return "generic"
    if _size(heading) > _QUERY_WORDS:
        return "too_long"
    return "text_too_short" if _size(body) < _POSITIVE_WORDS else ""


def _without_title(title: str, text: str) -> str:
    """A text without the title that it begins with, on a line or as a sentence of its own."""
    words = r"\s+".join(map(re.escape, title.split()))
    return re.sub(
        rf"\A\s*(?:#+\s+)?{words}(?:\s*\Z|[ \t]*[.:]?[ \t]*\n(?:[=\-~#*]+[ \t]*\n)?|[.:]\s)", "", text, flags=re.I
    ).strip()


_UNDERLINE = re.compile(r"""([=\-~^"'`:.+*#_])\1{2,}\s*""")
_FENCE = re.compile(r"\s*(?:```|~~~(?!~))")
_MARKDOWN = re.compile(r" {0,3}#{1,6}[ \t]+(\S.*)")
_HTML = re.compile(r"<h([1-6])\b[^<>]{0,200}>(.{0,300}?)</h\1\s*>", re.I | re.S)


def _sections(text: str) -> Iterator[tuple[str, str]]:
    """The headings of a text, each with the text up to the next one."""
    text = _HTML.sub(lambda found: f"\n# {' '.join(found[2].split())}\n", text)
    lines = text.split("\n")
    heading, body, fenced, i = "", list[str](), False, 0
    while i < len(lines):
        line, below = lines[i], lines[i + 1] if i + 1 < len(lines) else ""
        after_blank = i == 0 or not lines[i - 1].strip() or _UNDERLINE.fullmatch(lines[i - 1])
        underlined = _UNDERLINE.fullmatch(below) and line[:1].strip() and 2 * len(below.strip()) >= len(line.strip())
        markdown = _MARKDOWN.fullmatch(line)
        if _FENCE.match(line) and not _UNDERLINE.fullmatch(below):
            fenced = not fenced
        if not fenced and (markdown or (underlined and after_blank and not _UNDERLINE.fullmatch(line))):
            if body and _UNDERLINE.fullmatch(body[-1]):  # a line above the heading
                body.pop()
            if heading:
                yield heading, "\n".join(body).strip()
            heading, body = _plain(markdown[1] if markdown else line), []
            i += 1 if markdown else 2
        else:
            body.append(line)
            i += 1
    if heading:
        yield heading, "\n".join(body).strip()


def _plain(heading: str) -> str:
    """A heading without the markup of Markdown and HTML."""
    opened = heading.rstrip().rstrip("#")
    if opened[-1:].isspace():  # "# Heading #", but not "# C#"
        heading = opened
    heading = re.sub(r"!?\[([^\[\]]*)\]\([^()]*\)", r"\1", heading)  # a link's text
    heading = re.sub(r"<[^<>]{1,200}>|\{#[^{}]*\}|[*`]+", "", heading)
    return " ".join(html.unescape(heading).split())


# Sentences end at an "end", and are never continued past a "wall": blank and indented lines, lists, the marks of code.
_BOUNDARY = re.compile(
    r"""(?x) (?P<end> [.!?…؟۔।]+ (?: (?= \"{3} | '{3} ) | ["'”’)\]]* (?=\s) ) | [。！？｡]+ ["」』”’）]* )
    | (?P<wall> \n [ \t]* (?= \n | [-*+•>|\#] | \d+[.)]\s | :\w+ ) | \n (?= [ \t]+ \S | [\w*,\ ]{1,40}[ ]: ) | (?<=:) \n
        | \"{3} | '{3} | `{3} | >>>[^\n]* | -{3,} | ={3,} | ~{3,} | /\*+ | \*+/ | (?<!:)//
        | [:@] (?: param | type | returns? | rtype | raises? | throws ) \b
        | (?: Args | Arguments | Returns? | Raises | Yields | Examples? | Parameters | Usage | Notes? ) \s* : )"""
)
_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|etc|cf|vs|al|approx|Dr|Mr|Mrs|Ms|Prof|St|Fig|Eq|No|Vol|pp|ed)|\b[A-Z])\.\Z")
_SYMBOL = re.compile(r"[_=<>{}\[\]|\\`^~*/@#$%&+;]|\w\(|\w\.\w|\b(?:def|self)\b|\"|\d")
_WHOLE = re.compile(
    r"""(?!(?:\S+[ ]?){1,3}:\s)(?s:.)*[.!?…؟۔।。！？｡]["'”’)\]」』）]*"""
)  # a sentence, not a piece or a "name : description"
_LEADING = re.compile(r"[\s\-*+•>#|:.,;]*(?:\d+[.)]\s+)?")  # marks of lists and quotations


def _sentence_pair(id_: str, document: Document) -> tuple[str, str] | None:
    """A sentence and the document without it; the first by a hash that can be cut out, whole sentences before others."""
    title, text = document.title, document.text
    spans = list(_sentences(text))
    order = [
        (not _WHOLE.fullmatch(text, start, end), _hash(f"{id_}\n{start}"), start, end)
        for start, end in spans
        if _is_informative(text[start:end])
    ]
    if len(spans) == 1 and (part := _part(id_, text, *spans[0])):
        order.append((True, 2**64, *part))
    for *_, start, end in islice(sorted(order), _TRIED):
        query, rest = " ".join(text[start:end].split()), f"{text[:start].rstrip()} {text[end:].lstrip()}".strip()
        positive = Document(title, rest).full_text
        if _size(rest) >= _POSITIVE_WORDS and _normal(query) not in " ".join(positive.casefold().split()):
            return query, positive
    return None


def _sentences(text: str) -> Iterator[tuple[int, int]]:
    """Where the sentences of a text begin and end."""
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
    return 25 * len(_SYMBOL.findall(sentence)) <= len(sentence)


def _is_informative(sentence: str) -> bool:
    """Whether a sentence has the length of a query, is no code, and has three different words of three letters or more."""
    words = {word for word in re.findall(r"[^\W\d_]+", sentence.casefold()) if len(word) >= 3}
    long_enough = len(words) >= 3 or len(set(_UNSPACED_CHARACTER.findall(sentence))) >= 6
    return long_enough and _SENTENCE_WORDS[0] <= _size(sentence) <= _SENTENCE_WORDS[1] and _is_prose(sentence)


def _part(id_: str, text: str, start: int, end: int) -> tuple[int, int] | None:
    """A part of a text that is all one sentence, or has no punctuation."""
    if not _is_prose(text[start:end]):
        return None
    tokens = list(_TOKEN.finditer(text, start, end))
    per_word = max(1, round(len(tokens) / max(_size(text[start:end]), 1)))  # 2 in a script without spaces
    least, most = (count * per_word for count in _SPAN_WORDS)
    chosen = _hash(f"{id_}\npart")
    length = min(least + chosen % (most - least + 1), len(tokens) - _POSITIVE_WORDS * per_word)
    if length < least:
        return None
    starts = [(chosen >> 8 * i) % (len(tokens) - length + 1) for i in range(2, 6)]
    # Of as many words the most characters: the fewest of them are "of" and "the".
    begin, stop = max(((tokens[i].start(), tokens[i + length - 1].end()) for i in starts), key=lambda span: span[1] - span[0])
    while begin < stop and unicodedata.category(text[begin]).startswith("M"):  # a vowel sign stays with its letter
        begin += 1
    while stop < end and unicodedata.category(text[stop]).startswith("M"):
        stop += 1
    return begin, stop


# ------------------------------------------------------------------------------------ near-duplicates

_RUN = 3  # words
_COMPARED = 2000  # words of a text
_HASHES = 64  # of a text, in bands of four; texts that agree in a band are compared
_ALIKE = 0.7  # of the hashes are equal

_MIX = np.array([0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53, 0x9E3779B97F4A7C15], np.uint64)
_SEEDS = np.arange(1, _HASHES + 1, dtype=np.uint64) * _MIX[2:]


def _signature(text: str) -> np.ndarray:
    """MinHash: of the hashes of all runs of three words, 64 times the smallest, of which 16 bits are kept; shape (64,), uint16."""
    tokens = [found[0].strip(_MARKS) for found in islice(_TOKEN.finditer(text.casefold()), _COMPARED)]
    words = [zlib.crc32(token.encode()) for token in tokens if token]
    words += [0] * (_RUN - len(words))
    hashes = np.array(words, np.uint64)
    runs = _mixed(hashes[:-2] + _mixed(hashes[1:-1] + _mixed(hashes[2:])))
    return _mixed(runs[:, None] ^ _SEEDS).min(axis=0).astype(np.uint16)


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finalizer of MurmurHash3, on uint64; any shape."""
    shift = np.uint64(33)
    values = (values ^ (values >> shift)) * _MIX[0]
    values = (values ^ (values >> shift)) * _MIX[1]
    return values ^ (values >> shift)


def _near_duplicates(signatures: np.ndarray) -> np.ndarray:
    """Whether each text is a near-duplicate of an earlier one; signatures (texts, 64), result (texts,)."""
    duplicate = np.zeros(len(signatures), bool)
    for band in signatures.view(np.uint64).T:  # four hashes of 16 bits in one number
        order = np.argsort(band, kind="stable")
        earlier, later = order[:-1], order[1:]
        same = band[earlier] == band[later]
        earlier, later = earlier[same], later[same]
        alike = (signatures[earlier] == signatures[later]).mean(axis=1) >= _ALIKE
        duplicate[later[alike]] = True
    return duplicate
