"""Training pairs made from documents alone, for a corpus that has no queries.

A title, a heading or a sentence stands for the query, and the text that it belongs to for the document that answers it. The
sentence pairs are the inverse cloze task (Lee et al., arXiv 1906.00300). Nothing is random: a corpus always gives the same pairs.
"""

import json
import re
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from anysplade._common.files import user_path, whole_file
from anysplade._common.hashing import DataHash
from anysplade._common.outputs import file_digest, finished_record, record_path, write_record
from anysplade._common.progress import bar
from anysplade._common.provenance import provenance
from anysplade._common.tables import Tabular
from anysplade.data.corpus import Document, empty_corpus, iter_corpus
from anysplade.data.headings import sections
from anysplade.data.names import PAIR_KINDS
from anysplade.data.near_duplicates import near_duplicates, signature
from anysplade.data.sentences import MIN_POSITIVE_WORDS, sentence_pair
from anysplade.data.text import count_words, normalized, replace_surrogates, stable_hash
from anysplade.errors import DataError, OptionError

_MAX_QUERY_WORDS = 40  # of a title or heading
_SHOWN = 300  # characters of an example's texts in the record

# Headings that say nothing about their text, even if only one document has them.
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

_LeftOut = dict[str, Counter[str]]  # counts by part ("document" or a kind) and reason


@dataclass(frozen=True, repr=False)
class MadePairs(Tabular):
    """Result of ``make_pairs``, stored in ``OUTPUT.json`` next to the JSONL file."""

    pairs: dict[str, int]  # number of pairs, by kind
    documents: int  # number of documents read
    left_out: dict[str, dict[str, int]]  # number of documents, or of pairs by kind, by the reason
    examples: list[dict[str, str]]  # three rows of the JSONL file, of different kinds if possible; long texts are cut
    about: dict[str, Any]  # options, hash of the data, provenance

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "about"} | self.about

    def _rows(self) -> list[dict[str, Any]]:
        return [{"kind": kind, "pairs": count} for kind, count in self.pairs.items()]


def make_pairs(corpus: str, output: str | Path, *, kinds: Sequence[str] = PAIR_KINDS, progress: bool = False) -> MadePairs:
    """Make training pairs from the documents of a corpus, without any query.

    The kinds of pairs:

    - ``"title"``: a document's title, and its text
    - ``"heading"``: a heading in the text (Markdown, underlined as in reStructuredText, HTML), and the text up to the next one
    - ``"sentence"``: one sentence of 4 to 40 words, and the document without it; a text without sentences gives a
      part of 6 to 15 words. A hash of the document's id chooses it. Sentences of code are not used

    In scripts without spaces two characters count as a word. These are left out, and counted by reason:

    - near-duplicates of an earlier document, which would be wrong negatives of each other: texts that share about 70 % or more
      of their runs of three words (Jaccard similarity, estimated from 64 MinHash values of the first 2,000 words)
    - queries that stand for more than one text, whatever their case, and headings such as "Introduction"
    - titles and headings of more than 40 words, and texts of fewer than 8

    Args:
        corpus: any source of ``read_corpus``.
        output: a JSONL file with ``query``, ``positive``, ``kind`` and ``document_id``, which ``read_pairs`` reads. It appears
            when all pairs are made; a file that was made from the same corpus and options is not made again.
        kinds: the kinds of pairs to make.

    Raises:
        OptionError: a kind is unknown, or there is none.
        OutputError: the output exists and was made in another way, or cannot be written.
        DataError: no pair can be made, or as for ``read_corpus``.
    """
    if not kinds or not set(kinds) <= set(PAIR_KINDS):
        unknown = ", ".join(repr(kind) for kind in kinds if kind not in PAIR_KINDS) or "none"
        raise OptionError(f"`kinds`: {unknown}; choose from {', '.join(PAIR_KINDS)}")
    output = user_path(output)
    kinds = [kind for kind in PAIR_KINDS if kind in kinds]
    options: dict[str, Any] = {"corpus": str(corpus), "kinds": kinds}
    digest = DataHash()
    documents = _hashed(iter_corpus(corpus, progress=progress), digest, progress)
    if output.exists():
        for _ in documents:
            pass
        before = finished_record(output, options | {"data_hash": digest.hexdigest()})
        if before is not None:
            return MadePairs(**{field.name: before.pop(field.name) for field in fields(MadePairs)[:-1]}, about=before)
    with whole_file(output) as file, tempfile.TemporaryFile(dir=output.parent) as candidates:
        # Which candidates are kept is known at the end; until then only a few numbers per candidate are in memory.
        numbers = array("Q")  # of each candidate: its document, a hash of its query, and its kind
        signatures = bytearray()  # of the documents with a text
        left_out: _LeftOut = {part: Counter() for part in ("document", *kinds)}
        read = with_text = 0  # documents
        for id_, document in documents:
            read += 1
            document = Document(replace_surrogates(document.title), replace_surrogates(document.text))
            if not count_words(document.text):
                left_out["document"]["without_text"] += 1
                continue
            for kind, query, positive in _pairs(id_, document, kinds, left_out):
                row = {"query": query, "positive": positive, "kind": kind, "document_id": id_}
                candidates.write(replace_surrogates(json.dumps(row, ensure_ascii=False)).encode() + b"\n")
                numbers.extend((with_text, stable_hash(normalized(query)), kinds.index(kind)))
            signatures += signature(document.text).tobytes()
            with_text += 1
        if not read:
            raise empty_corpus(corpus)
        is_duplicate = near_duplicates(signatures)
        of_document, query_hashes, of_kind = np.asarray(numbers).reshape(-1, 3).T
        kept = ~is_duplicate[of_document]
        _, inverse, counts = np.unique(query_hashes[kept], return_inverse=True, return_counts=True)
        is_shared = np.zeros(len(kept), bool)
        is_shared[kept] = counts[inverse] > 1
        kept &= ~is_shared
        left_out["document"]["near_duplicates"] = int(is_duplicate.sum())
        for number, kind in enumerate(kinds):
            left_out[kind]["query_of_several_texts"] = int((is_shared & (of_kind == number)).sum())
        reasons = {part: dict(+counted) for part, counted in left_out.items()}  # without those that did not occur
        if not kept.any():
            raise DataError(_no_pair(corpus, read, reasons))
        # Examples are the first pair of each kind, and the first pairs of any kind up to three.
        found = np.flatnonzero(kept)
        _, first = np.unique(of_kind[found], return_index=True)
        shown = list(dict.fromkeys([*found[first], *found[:3]]))[:3]
        examples: dict[int, dict[str, str]] = {}
        candidates.seek(0)
        for i, line in enumerate(candidates):
            if kept[i]:
                file.write(line)
                if i in shown:
                    examples[i] = {name: _cut(value) for name, value in json.loads(line).items()}
        file.flush()
        made = MadePairs(
            pairs={kind: int((of_kind[found] == number).sum()) for number, kind in enumerate(kinds)},
            documents=read,
            left_out=reasons,
            examples=[examples[i] for i in shown],
            about=options | {"data_hash": digest.hexdigest(), "sha256": file_digest(Path(file.name)), "provenance": provenance()},
        )
        write_record(record_path(output), made.to_dict())  # first: without the output it is ignored
    return made


def _hashed(documents: Iterable[tuple[str, Document]], digest: DataHash, progress: bool) -> Iterator[tuple[str, Document]]:
    """The documents unchanged; each is added to the digest when it is read."""
    with bar("making pairs", "document", show=progress) as shown:
        for id_, document in documents:
            digest.add((id_, document.title, document.text))
            yield id_, document
            shown.update()


def _no_pair(corpus: str, read: int, reasons: dict[str, dict[str, int]]) -> str:
    found = [described for counted in reasons.values() if (described := in_words(counted))]
    others = [kind for kind in PAIR_KINDS if kind not in reasons]
    fix = f"try other `kinds`: {', '.join(others)}" if others else "give a corpus with titles, or with longer texts"
    if reasons["document"].get("without_text") == read:
        fix = "give documents with texts; titles alone are not enough"
    return f"{corpus}: none of {read:,} documents gave a pair ({', '.join(found)}); {fix}"


def in_words(left_out: Mapping[str, int]) -> str:
    """Reasons why documents or pairs were left out, with their numbers, for a message."""
    return ", ".join(f"{reason.replace('_', ' ')}: {count:,}" for reason, count in left_out.items())


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _pairs(id_: str, document: Document, kinds: Sequence[str], left_out: _LeftOut) -> Iterator[tuple[str, str, str]]:
    """Kind, query and positive of each pair of a document; the reasons for missing pairs are counted in ``left_out``."""
    title, text = document.title, document.text
    if "title" in kinds:
        if not title.strip():
            left_out["title"]["without_title"] += 1
        elif reason := _unusable(title, body := _without_title(title, text)):
            left_out["title"][reason] += 1
        else:
            yield "title", " ".join(title.split()), body
    if "heading" in kinds:
        found = list(sections(text))
        left_out["heading"]["without_heading"] += not found
        for heading, body in found:
            if reason := "same_as_title" if normalized(heading) == normalized(title) else _unusable(heading, body):
                left_out["heading"][reason] += 1
            else:
                yield "heading", heading, body
    if "sentence" in kinds:
        if pair := sentence_pair(id_, document):
            yield "sentence", *pair
        else:
            left_out["sentence"]["without_sentence"] += 1


def _unusable(heading: str, body: str) -> str:
    """Why a title or heading and its text are no pair; empty if they are one."""
    if normalized(heading) in _GENERIC or not any(map(str.isalpha, heading)):
        return "generic"
    if count_words(heading) > _MAX_QUERY_WORDS:
        return "too_long"
    return "text_too_short" if count_words(body) < MIN_POSITIVE_WORDS else ""


def _without_title(title: str, text: str) -> str:
    """A text without the title that it begins with, as a line or a sentence of its own."""
    words = r"\s+".join(map(re.escape, title.split()))
    repeated = rf"\A\s*(?:#+\s+)?{words}(?:\s*\Z|[ \t]*[.:]?[ \t]*\n(?:[=\-~#*]+[ \t]*\n)?|[.:]\s)"
    return re.sub(repeated, "", text, flags=re.I).strip()
