"""Training examples: a query, a relevant document, hard negatives and a teacher's scores, in many formats.

A row is a line of JSON or a row of a table. Its columns are recognized by their names:

- pairs and triples: ``query``, ``positive``, ``negative``; several negatives are ``negative_1``, ``negative_2``, ...
  or a list; a list of positives gives one example for each
- judged: ``query``, ``document``, ``label``; a label of 0 or below means not relevant, and the row is left out
- scored: ``scores`` of the positives and then of each negative, or ``score``, the margin of the one negative
- lists: ``query``, ``documents``, ``scores``; the document with the highest score is the positive. With ``labels``,
  documents above 0 are positives and the others negatives
- ids instead of texts: ``query_id``, ``positive_id``, ``negative_ids``, ``doc_ids``; the texts are in a collection
- MS MARCO: ``query`` and ``passages`` with ``passage_text`` and ``is_selected``, which marks the positives

This covers the formats of FlagEmbedding, sentence-transformers, Tevatron and DPR.
"""

import contextlib
import functools
import json
import logging
import math
import random
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets.arrow_writer import ArrowWriter

from anysplade._common.files import write_atomic, writing
from anysplade._common.hashing import DataHash
from anysplade.data.collections import (
    ID_NAMES,
    QUERY_NAMES,
    TEXT_NAMES,
    Document,
    Pair,
    find_qrels,
    ir_queries,
    load_collection,
    load_python_docs,
    read_corpus,
    read_queries,
)
from anysplade.data.sources import (
    CORPUS_FILES,
    Place,
    Source,
    as_data_error,
    find_file,
    hub_dataset,
    replace_surrogates,
    resolve,
    rows,
)
from anysplade.errors import DataError

logger = logging.getLogger(__name__)

# Names that the column of each role can have; the first that is there is used. "... id" are roles of ids instead of texts.
_NAMES = {
    "query": ("query", "anchor", "question", "query_text"),
    "query id": ("query_id", "qid", "query-id"),
    "positive": (
        *("positive", "positives", "pos", "positive_passages", "positive_ctxs"),
        *("document", "passage", "answer", "response"),
    ),
    "positive id": ("positive_id", "positive_ids", "pos_id", "positive_document_ids", "doc_id", "corpus-id"),
    "negative": ("negative", "negatives", "neg", "negs", "negative_passages", "hard_negative_ctxs", "negative_ctxs"),
    "negative id": ("negative_id", "negative_ids", "neg_id", "neg_ids", "negative_document_ids"),
    "documents": ("documents", "passages"),
    "documents id": ("doc_ids", "document_ids", "passage_ids"),
    "scores": ("scores", "score"),
    "label": ("labels", "label"),
    "positive scores": ("positive_scores", "pos_scores"),
    "negative scores": ("negative_scores", "neg_scores"),
}

# Columns of which nothing needs saying: they are called what they are, or stand in the files that anysplade makes itself.
_PLAIN = {"query", "positive", "negative", "negatives", "scores", "kind", "document_id"}
_ROLES = {name for names in _NAMES.values() for name in names}
_NUMBERED = re.compile(r"(negative|neg)_\d+")
_SAMPLED = 64  # examples, to calibrate a head on
_LOOKED_AT = 20  # examples, to tell whether they are ids

_Row = tuple[str, dict[str, Any]]  # its place (source and number), and its columns


def load_pairs(source: str | Path, *, texts: str | None = None, negatives: int | None = None, progress: bool = False) -> list[Pair]:
    """Read all training examples into a list; ``source``, ``texts``, ``negatives`` and errors are those of ``read_pairs``."""
    return list(read_pairs(source, texts=texts, negatives=negatives, progress=progress))


def read_pairs(
    source: str | Path, *, texts: str | None = None, negatives: int | None = None, progress: bool = False
) -> Iterator[Pair]:
    """Read and check training examples one by one; only the texts of ids are kept in memory.

    Args:
        source: a JSONL, CSV, TSV or Parquet file, compressed or not; a BEIR folder, of which ``pairs.jsonl`` is read, or else
            ``qrels/train.tsv`` with grades as labels; an ir_datasets id; the folder or hub id of a dataset, as ``id`` or
            ``id:config``; or ``"python-docs"``.
        texts: a collection with the texts of ids: a BEIR folder, an ir_datasets id, or a hub dataset with the configs
            ``queries`` and ``corpus``. None: the source itself.
        negatives: how many of each example's negatives to use. None: all, and every example must have the same number.
        progress: show a progress bar while python-docs is read.

    Raises:
        DataError: there is nothing to train on, ids stand where texts must be, or a row cannot be used; the message names file
            and line.
    """
    given_rows, own_texts = _open(source, progress)
    lookup = _Lookup((lambda: _texts(resolve(texts, "texts"))) if texts else own_texts, bool(texts))
    pairs = _read(source, given_rows, lookup, negatives)
    first = list(islice(pairs, _LOOKED_AT))
    _require_texts(source, first, lookup)
    yield from chain(first, pairs)


def _read(source: str | Path, given_rows: Iterable[_Row], lookup: "_Lookup", negatives: int | None) -> Iterator[Pair]:
    """The examples of rows, all of one shape."""
    columns: dict[str, Any] = {}
    names: set[str] = set()
    expected = None
    used = irrelevant = 0  # rows
    for place, given in given_rows:
        row = _by_selection({name: value for name, value in given.items() if value is not None})
        if not columns:
            columns = _find_columns(row, place)
            names = _recognized(row)
            if row.keys() - _PLAIN:
                _say_columns(str(source), _describe_columns(columns, row))
        elif _recognized(row) != names:
            raise DataError(f"{place}: {_difference(_recognized(row), names)}; give every row the same columns")
        relevant = False
        for pair in _examples(row, columns, lookup, place, negatives):
            relevant = True
            shape = f"{len(pair.negatives)} negatives and {len(pair.scores or ())} scores"
            if shape != (expected := expected or shape):
                fix = "give all as many" + (", or use the first N of each with `negatives=N`" if negatives is None else "")
                raise DataError(f"{place}: {shape}, but the rows before have {expected}; {fix}")
            yield pair
        used += relevant
        irrelevant += not relevant
    if irrelevant:
        logger.info("%s: %s of %s rows left out: their labels are 0 or below", source, f"{irrelevant:,}", f"{used + irrelevant:,}")
    if expected is None:
        fix = "a row needs a document with a label above 0" if irrelevant else "each row needs query and positive"
        raise DataError(f"{source}: no training pair in it; {fix}")


@functools.lru_cache(maxsize=1)  # mining reads the data a second time
def _say_columns(source: str, described: str) -> None:
    logger.info("%s: %s", source, described)


def _require_texts(source: str | Path, pairs: Sequence[Pair], lookup: "_Lookup") -> None:
    """Raise DataError if the texts of examples are ids: documents that are only numbers, or ids of the collection beside them.

    Queries that are only numbers may be meant, such as numbers of parts, and so may single words with a digit: a warning.
    """
    columns = {
        "query": [pair.query for pair in pairs],
        "positive": [pair.positive for pair in pairs],
        "negative": [text for pair in pairs for text in pair.negatives],
    }
    for role, texts in columns.items():
        numbers = _most(texts, str.isdecimal)
        if (numbers and role != "query") or lookup.are_ids(role, texts):
            raise DataError(
                f"{source}: {role} has ids, such as {texts[0][:80]!r}, and no texts; name columns of ids query_id, positive_id and "
                "negative_id, and the collection that has their texts, if it is another, with `texts`"
            )
        if numbers:
            logger.warning("%s: the first queries are only numbers; if they are ids, name the column query_id", source)
        elif _most(texts, lambda text: not re.search(r"\s", text) and re.search(r"\d", text) is not None):
            logger.warning(
                "%s: the first texts of %s are single words such as %r; if they are ids, name the column %s_id",
                source,
                role,
                texts[0][:80],
                role,
            )


def _most(texts: Sequence[str], matches: Callable[[str], bool]) -> bool:
    """Whether nine in ten of the texts are of a kind."""
    return bool(texts) and sum(matches(text.strip()) for text in texts) >= 0.9 * len(texts)


def _by_selection(row: dict[str, Any]) -> dict[str, Any]:
    """A row of MS MARCO as documents with labels; any other row unchanged."""
    passages = row.get("passages")
    if isinstance(passages, dict):  # of lists, one for each column
        texts, labels = passages.get("passage_text"), passages.get("is_selected")
    elif isinstance(passages, list) and passages and all(isinstance(p, dict) and "is_selected" in p for p in passages):
        texts, labels = [p.get("passage_text") for p in passages], [p["is_selected"] for p in passages]
    else:
        return row
    if texts is None or labels is None:
        return row
    return {name: value for name, value in row.items() if name != "passages"} | {"documents": texts, "labels": labels}


def _recognized(row: dict[str, Any]) -> set[str]:
    """The columns of a row whose names have a role."""
    return {name for name in row if name in _ROLES or _NUMBERED.fullmatch(name)}


def _difference(now: set[str], before: set[str]) -> str:
    missing, new = sorted(before - now), sorted(now - before)
    return " and ".join([f'"{name}" is missing' for name in missing[:1]] + [f'"{name}" is new here' for name in new[:1]])


# -------------------------------------------------------------------------------- examples on disk


class StoredPairs(Sequence[Pair]):
    """Examples in a memory-mapped Arrow file: any number of them, with random access.

    ``dataset`` is the Arrow table, and ``data_hash`` the SHA-256 of the examples in their order.
    """

    def __init__(self, folder: Path) -> None:
        """Open the examples that ``write`` wrote to a folder."""
        about = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
        self.dataset: datasets.Dataset = datasets.Dataset.from_file(str(folder / "examples.arrow"))
        self.data_hash: str = about["data_hash"]
        self._negatives = [name for name in self.dataset.column_names if name.startswith("negative_")]

    @classmethod
    def write(cls, pairs: Iterable[Pair], folder: Path) -> "StoredPairs":
        """Write examples with equal numbers of negatives and scores to ``folder``; the columns are in the trainer's order."""
        try:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                data_hash = cls._write_arrow(pairs, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        write_atomic(folder / "examples.json", json.dumps({"data_hash": data_hash}) + "\n")
        return cls(folder)

    @staticmethod
    def _write_arrow(pairs: Iterable[Pair], folder: Path) -> str:
        digest = DataHash()
        writer = None
        with open(folder / "examples.arrow", "wb") as file:  # the writer would take :: in a path for a chain of file systems
            for pair in pairs:
                row: dict[str, Any] = {"query": pair.query, "positive": pair.positive}
                row |= {f"negative_{i}": text for i, text in enumerate(pair.negatives, 1)}
                if pair.scores is not None:
                    row["label"] = list(pair.scores)
                digest.add(pair)
                if writer is None:
                    features = {
                        name: datasets.List(datasets.Value("float32")) if name == "label" else datasets.Value("string")
                        for name in row
                    }
                    writer = ArrowWriter(stream=file, features=datasets.Features(features))
                writer.write(row)
            if writer is not None:
                writer.finalize()
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        row = self.dataset[i]
        return Pair(
            row["query"], row["positive"], tuple(row[name] for name in self._negatives), tuple(row.get("label") or ()) or None
        )


# ------------------------------------------------------------------------------- examples of a row


def _find_columns(row: dict[str, Any], place: str) -> dict[str, Any]:
    """The name of each role's column; for numbered negatives the list of their names."""
    columns: dict[str, Any] = {}
    for role, names in _NAMES.items():
        name = next((name for name in names if name in row), None)
        if name:
            columns[role] = name
    numbered = sorted(filter(_NUMBERED.fullmatch, row), key=lambda name: int(name.rpartition("_")[2]))
    if numbered:
        columns["negative"] = numbered
    if not {"query", "query id"} & columns.keys():
        raise _no_column("query", row, place)
    if not {"positive", "positive id", "documents", "documents id"} & columns.keys():
        raise _no_column("positive", row, place)
    if {"documents", "documents id"} & columns.keys():
        if not {"scores", "label"} & columns.keys():
            raise _no_column("scores", row, place)
    elif {"negative", "negative id"} & columns.keys():  # sentence-transformers calls the scores of negatives "label"
        label = columns.pop("label", None)
        if label:
            columns.setdefault("scores", label)
    elif "scores" in columns:  # of one document: without negatives to compare it with, it says whether the document is relevant
        score = columns.pop("scores")
        columns.setdefault("label", score)
    if len({"positive scores", "negative scores"} & columns.keys()) == 1:  # one without the other is useless
        columns = {role: name for role, name in columns.items() if role not in ("positive scores", "negative scores")}
    return columns


def _no_column(role: str, row: dict[str, Any], place: str) -> DataError:
    names = ", ".join(_NAMES[role] + (_NAMES["label"] if role == "scores" else ()))
    given = ", ".join(name[:40] for name in row) or "none"
    ids = f" (or, for ids, {', '.join(_NAMES[f'{role} id'])})" if f"{role} id" in _NAMES else ""
    return DataError(f"{place}: no column for the {role} (columns: {given}); name it one of {names}{ids}")


def _describe_columns(columns: dict[str, Any], row: dict[str, Any]) -> str:
    used = {role: _listed(names) for role, names in columns.items()}
    labels = [
        role if names == [role] else f'{role} from "{names[0]}"' if len(names) == 1 else f'{role} from "{names[0]} ... {names[-1]}"'
        for role, names in used.items()
    ]
    unused = [name for name in row if not any(name in names for names in used.values())]
    return f"columns: {', '.join(labels)}" + (f"; not used: {', '.join(unused)}" if unused else "")


def _examples(row: dict[str, Any], columns: dict[str, Any], lookup: "_Lookup", place: str, limit: int | None) -> Iterator[Pair]:
    """The examples of a row, one for each positive, with at most ``limit`` negatives each."""

    def read(role: str) -> list[str] | None:
        if f"{role} id" in columns and role not in columns:
            return [lookup.text(role, id_, place) for id_ in _listed(row[columns[f"{role} id"]])]
        if role not in columns:
            return None
        return [_text(value, role, name, lookup, place) for name in _listed(columns[role]) for value in _listed(row[name])]

    queries = read("query") or []
    if len(queries) != 1:
        raise DataError(f"{place}: {len(queries)} queries; give each row one")
    scores, labels, *split = (
        _scores(row, columns[role], place) if role in columns else None
        for role in ("scores", "label", "positive scores", "negative scores")
    )
    if labels and max(labels) <= 0:
        return
    documents = read("documents")
    if documents is not None:
        values = labels if scores is None else scores
        assert values is not None  # _find_columns requires one of them
        if not documents or any(given is not None and len(given) != len(documents) for given in (scores, labels)):
            raise DataError(f"{place}: {len(documents)} documents and {len(values)} scores; give each document one")
        ranked = sorted(range(len(documents)), key=lambda i: -values[i])
        relevant = set(ranked[:1]) if labels is None else {i for i in ranked if labels[i] > 0}
        sides = [i for i in ranked if i in relevant], [i for i in ranked if i not in relevant]
        positives, negatives = ([documents[i] for i in side] for side in sides)
        split = [[values[i] for i in side] for side in sides]
        scores = None
    else:
        positives, negatives = read("positive") or [], read("negative") or []
    if not positives:
        raise DataError(f"{place}: no positive; give each row at least one")
    if documents is None and not negatives:
        labels, scores = scores if labels is None else labels, None
        if labels is not None:
            if len(labels) not in (1, len(positives)):
                raise DataError(f"{place}: {len(labels)} labels for {len(positives)} positives; give each positive one")
            labels = labels * len(positives) if len(labels) == 1 else labels
            positives = [text for text, label in zip(positives, labels, strict=True) if label > 0]
    margins = None
    if split[0] is not None and split[1] is not None:
        if len(split[0]) != len(positives) or len(split[1]) != len(negatives):
            raise DataError(
                f"{place}: {len(split[0])} and {len(split[1])} scores for {len(positives)} positives and {len(negatives)} "
                "negatives; give each one"
            )
    elif scores is not None and len(scores) == len(positives) + len(negatives):
        split = [scores[: len(positives)], scores[len(positives) :]]
    elif scores is not None and len(positives) == 1 and len(scores) == len(negatives):
        margins = scores
    elif scores is not None:
        which = "one positive" if len(positives) == 1 else f"{len(positives)} positives"
        raise DataError(
            f"{place}: {len(scores)} scores for {which} and {len(negatives)} negatives; give one each, the positive's "
            "first, or the margin of each negative"
        )
    count = len(negatives) if limit is None else limit
    if len(negatives) < count:
        raise DataError(f"{place}: {len(negatives)} negatives, but `negatives` is {count}; lower it, or add negatives")
    for i, positive in enumerate(positives):
        pair_scores = None if margins is None else tuple(margins[:count])
        if split[0] is not None and split[1] is not None:
            pair_scores = (split[0][i], *split[1][:count])
        yield Pair(queries[0], positive, tuple(negatives[:count]), pair_scores if count else None)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _text(value: Any, role: str, name: str, lookup: "_Lookup", place: str) -> str:
    if isinstance(value, dict):  # a passage with a title
        title, text = value.get("title") or "", value.get("text", value.get("contents"))
        value = f"{title} {text}".strip() if isinstance(title, str) and isinstance(text, str) else None
    if isinstance(value, int) and not isinstance(value, bool) and lookup.given:
        return lookup.text(role, value, place)
    if not isinstance(value, str):
        value = json.dumps(value, default=str)[:40]
        raise DataError(f'{place}: "{name}" is {value}, not a string; for ids name the collection of their texts with `texts`')
    if not value.strip():
        raise DataError(f'{place}: "{name}" is empty; give it a text or remove the row')
    if lookup.given and lookup.has(role, value):
        raise DataError(f'{place}: "{name}" is {value[:80]!r}, an id of `texts`; name the column "{_NAMES[f"{role} id"][0]}"')
    return replace_surrogates(value)


def _scores(row: dict[str, Any], name: str, place: str) -> list[float]:
    values = _listed(row[name])
    scores = []
    for value in values:
        try:
            scores.append(math.nan if isinstance(value, bool) else float(value))  # cells of CSV and TSV are strings
        except (TypeError, ValueError, OverflowError):
            scores.append(math.nan)
        if not math.isfinite(scores[-1]):
            raise DataError(f'{place}: "{name}" has {json.dumps(value, default=str)[:40]}; give finite numbers')
    return scores


# ----------------------------------------------------------------------------------- texts of ids


class _Texts(NamedTuple):
    """The texts of a collection, by id."""

    name: str
    queries: Mapping[str, str]
    documents: Mapping[str, str]


class _Lookup:
    """Texts by id; the collection is opened when the first id is looked up.

    ``given`` says whether the user named the collection with ``texts``.
    """

    def __init__(self, open_texts: Callable[[], _Texts | None], given: bool) -> None:
        self._open = functools.cache(open_texts)
        self.given = given

    def text(self, role: str, id_: Any, place: str) -> str:
        texts = self._open()
        if texts is None:
            raise DataError(f"{place}: the row has ids; name the collection of their texts with `texts`")
        kind = "query" if role == "query" else "document"
        try:
            text = (texts.queries if role == "query" else texts.documents)[str(id_)]
        except KeyError:
            raise DataError(f"{place}: the {kind} {str(id_)!r} is not in {texts.name}; add it there or remove the row") from None
        if not text.strip():
            raise DataError(f"{place}: the {kind} {str(id_)!r} has an empty text in {texts.name}; remove the row")
        return replace_surrogates(text)

    def are_ids(self, role: str, texts: Sequence[str]) -> bool:
        """Whether all of these are ids of the collection, which is opened only if each looks like one."""
        if not texts or not all(re.fullmatch("[!-~]+", text) for text in texts):
            return False
        with contextlib.suppress(DataError):  # a corpus without queries, say, has no texts of ids
            return all(self.has(role, text) for text in texts)
        return False

    def has(self, role: str, id_: str) -> bool:
        texts = self._open()
        return texts is not None and id_ in (texts.queries if role == "query" else texts.documents)


def _texts(source: Source) -> _Texts:
    if source.kind == "folder":
        return _beir_texts(source.at)
    if source.kind == "ir_datasets":
        return _Texts(source.name, ir_queries(source.at), _Documents(source.at))
    if source.kind == "hub":
        queries, documents = (hub_dataset(str(source.at), config) for config in ("queries", "corpus"))
        return _Texts(source.name, _HubTexts(queries, QUERY_NAMES), _HubTexts(documents, TEXT_NAMES))
    raise DataError(f"{source.name}: has no queries and documents for the ids; name a collection that has both")


def _beir_texts(folder: Place) -> _Texts:
    return _Texts(str(folder), read_queries(folder), {id_: document.full_text for id_, document in read_corpus(folder).items()})


class _HubTexts(Mapping[str, str]):
    """Texts, with their titles, of a memory-mapped table; only the ids are in memory.

    If no column has a known name, the first one has the ids, and the last one the texts.
    """

    def __init__(self, table: Any, names: Sequence[str]) -> None:
        columns = table.column_names
        self._table = table
        self._text = next((name for name in names if name in columns), columns[-1])
        ids = table[next((name for name in ID_NAMES if name in columns), columns[0])]
        self._rows = {str(id_): i for i, id_ in enumerate(ids)}

    def __getitem__(self, id_: str) -> str:
        row = self._table[self._rows[id_]]
        return Document(row.get("title") or "", row[self._text]).full_text

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


class _Documents(Mapping[str, str]):
    """Texts of an ir_datasets document store, which reads them from disk."""

    def __init__(self, dataset: Any) -> None:
        self._dataset, self._store = dataset, dataset.docs_store()

    def __getitem__(self, id_: str) -> str:
        return self._store.get(id_).default_text()

    def __iter__(self) -> Iterator[str]:
        return (document.doc_id for document in self._dataset.docs_iter())

    def __len__(self) -> int:
        return self._dataset.docs_count()


# --------------------------------------------------------------------------------- rows of a source


def _open(name: str | Path, progress: bool) -> tuple[Iterable[_Row], Callable[[], _Texts | None]]:
    """The rows of a source, and a function that opens its own texts of ids."""
    source = resolve(name, "training data", "train")
    if source.kind == "python-docs":
        pairs = load_python_docs(progress=progress)[1]
        return ((f"{name}:{i}", {"query": pair.query, "positive": pair.positive}) for i, pair in enumerate(pairs, 1)), lambda: None
    if source.kind == "ir_datasets":
        return _ir_rows(source.name, source.at), lambda: _texts(source)
    if source.kind == "file":
        return _file_rows(source.at), lambda: _texts_in(source.at.parent)
    if source.kind == "folder":
        pairs_file = find_file(source.at, ["pairs.jsonl"])
        if pairs_file is not None:
            return _file_rows(pairs_file), lambda: _texts_in(source.at)
        if find_qrels(source.at, "train")[0] is not None:
            return _qrels_rows(source), lambda: None
        if find_file(source.at, CORPUS_FILES) is not None or not any(path.is_file() for path in source.at.iterdir()):
            raise DataError(f"{name}: nothing to train on; the folder needs pairs.jsonl or qrels/train.tsv")
    rows = hub_dataset(str(source.at), source.config, streaming=True)
    return _hub_rows(source.name, rows), lambda: _texts(source._replace(kind="hub"))


def _texts_in(folder: Place) -> _Texts | None:
    return None if find_file(folder, CORPUS_FILES) is None else _beir_texts(folder)


def _file_rows(path: Place) -> Iterator[_Row]:
    return ((f"{path}:{number}", row) for number, row in rows(path))


def _hub_rows(source: str, rows: Iterable[dict[str, Any]]) -> Iterator[_Row]:
    with as_data_error(source):  # a streamed dataset raises its errors while it is read
        for number, row in enumerate(rows, 1):
            yield f"{source}:{number}", row


def _qrels_rows(source: Source) -> Iterator[_Row]:
    collection = load_collection(source.at, "train")
    for query_id, grades in collection.qrels.items():
        for document_id, grade in grades.items():
            if document_id in collection.corpus:
                row = {"query": collection.queries[query_id], "positive": collection.corpus[document_id].full_text, "label": grade}
                yield f"{source.name}, judgements of the query {query_id!r}", row


def _ir_rows(source: str, dataset: Any) -> Iterator[_Row]:
    """Triples of ids if the dataset has them, else judgements."""
    if dataset.has_docpairs():
        for number, triple in enumerate(dataset.docpairs_iter(), 1):
            ids = {"query_id": triple.query_id, "positive_id": triple.doc_id_a, "negative_id": triple.doc_id_b}
            yield f"{source}:{number}", ids
    elif dataset.has_qrels():
        for number, judged in enumerate(dataset.qrels_iter(), 1):
            yield f"{source}:{number}", {"query_id": judged.query_id, "positive_id": judged.doc_id, "label": judged.relevance}
    else:
        raise DataError(f"{source}: this ir_datasets id has no triples or judgements; name one that has, such as its /train")


def sample_pairs(pairs: Sequence[Pair], seed: int = 0) -> tuple[list[str], list[str]]:
    """Up to 64 queries and documents of the training pairs."""
    sampled = random.Random(seed).sample(pairs, min(_SAMPLED, len(pairs)))
    return [pair.query for pair in sampled], [pair.positive for pair in sampled]
