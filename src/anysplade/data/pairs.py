"""Training examples, from whatever people have.

An example is a query, a document that answers it, hard negatives and a teacher's scores. Columns are found
by their names, in any of these forms; a line of JSON is a row, and so is a row of a table:

- pairs and triples: ``query``, ``positive``, ``negative``; several negatives are ``negative_1``, ``negative_2``, ...
  or a list; several positives in a list make an example each
- judged: ``query``, ``document``, ``label``; 0 or below says that the document is no answer, and the row is left out
- scored: ``scores`` of the positives and then of each negative, or ``score``, the margin of the one negative
- lists: ``query``, ``documents``, ``scores``; the document of the highest score is the positive. With ``labels``, each
  document above 0 is a positive and those at 0 or below are the negatives
- ids instead of texts: ``query_id``, ``positive_id``, ``negative_ids``, ``doc_ids``, with the texts elsewhere
- MS MARCO's: ``query`` and ``passages`` with ``passage_text`` and ``is_selected``, which tells positives from negatives

So rows of FlagEmbedding, sentence-transformers, Tevatron and DPR are read as they are.
"""

import functools
import hashlib
import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets.arrow_writer import ArrowWriter

from anysplade._common.files import write_whole
from anysplade.data.collections import (
    ID_NAMES,
    QUERY_NAMES,
    TEXT_NAMES,
    Document,
    Pair,
    find_qrels,
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
    resolve,
    rows,
    whole_characters,
)
from anysplade.errors import DataError

logger = logging.getLogger(__name__)

# The names a column may have; the first found is taken. "id" stands for ids whose texts lie elsewhere.
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

_ROLES = {name for names in _NAMES.values() for name in names}
_NUMBERED = re.compile(r"(negative|neg)_\d+")

Row = tuple[str, dict[str, Any]]  # where it stands, and its columns


def load_pairs(source: str | Path, *, texts: str | None = None, negatives: int | None = None, progress: bool = False) -> list[Pair]:
    """Read all training examples into a list; ``source``, ``texts``, ``negatives`` and errors are those of ``read_pairs``."""
    return list(read_pairs(source, texts=texts, negatives=negatives, progress=progress))


def read_pairs(
    source: str | Path, *, texts: str | None = None, negatives: int | None = None, progress: bool = False
) -> Iterator[Pair]:
    """Training examples one after the other, each checked; nothing but the texts of ids is kept in memory.

    Args:
        source: a file (JSONL, gzipped or not; CSV, TSV, Parquet); a BEIR folder, which gives its ``pairs.jsonl``
            or else its ``qrels/train.tsv``, whose grades are labels; an ir_datasets id; a folder or hub id of a
            dataset, as ``id`` or ``id:config``; or ``"python-docs"``.
        texts: where the texts of ids are: a BEIR folder, an ir_datasets id, a hub dataset with the configs
            ``queries`` and ``corpus``. None: where the source is.
        negatives: use the first so many of each example; None: all, and every example must have as many.

    Raises:
        DataError: nothing to train on, or a row that cannot be used; the message names file and line.
    """
    found, own_texts = _open(str(source), progress)
    lookup = _Lookup(functools.partial(_texts, texts) if texts else own_texts, bool(texts))
    columns: dict[str, Any] = {}
    named: set[str] = set()
    expected = None
    used = irrelevant = 0  # rows
    for place, given in found:
        row = _by_selection({name: value for name, value in given.items() if value is not None})
        if not columns:
            columns = _find_columns(row, place)
            named = _known(row)
            logger.info("%s: %s", source, _echo(columns, row))
        elif _known(row) != named:
            raise DataError(f"{place}: {_difference(_known(row), named)}; give every row the same columns")
        relevant = False
        for pair in _examples(row, columns, lookup, place, negatives):
            relevant = True
            if expected is None:
                expected = _shape(pair)
            elif _shape(pair) != expected:
                raise DataError(
                    f"{place}: {_describe(_shape(pair))}, the rows before have {_describe(expected)}; {_mend(negatives)}"
                )
            yield pair
        used += relevant
        irrelevant += not relevant
    if irrelevant:
        logger.info("%s: %s of %s rows left out: their labels are 0 or below", source, f"{irrelevant:,}", f"{used + irrelevant:,}")
    if expected is None:
        raise DataError(
            f"{source}: no training pair in it; "
            + ("a row needs a document with a label above 0" if irrelevant else "each row needs query and positive")
        )


def _by_selection(row: dict[str, Any]) -> dict[str, Any]:
    """A row of MS MARCO as a labelled list; any other row as it is."""
    passages = row.get("passages")
    if isinstance(passages, dict):  # a list for each column
        texts, labels = passages.get("passage_text"), passages.get("is_selected")
    elif isinstance(passages, list) and passages and all(isinstance(p, dict) and "is_selected" in p for p in passages):
        texts, labels = [p.get("passage_text") for p in passages], [p["is_selected"] for p in passages]
    else:
        return row
    if texts is None or labels is None:
        return row
    return {name: value for name, value in row.items() if name != "passages"} | {"documents": texts, "labels": labels}


def _known(row: dict[str, Any]) -> set[str]:
    """The columns of a row that have a meaning."""
    return {name for name in row if name in _ROLES or _NUMBERED.fullmatch(name)}


def _difference(now: set[str], before: set[str]) -> str:
    missing, new = sorted(before - now), sorted(now - before)
    said = [f'"{name}" is missing' for name in missing[:1]] + [f'"{name}" is new here' for name in new[:1]]
    return " and ".join(said)


def _shape(pair: Pair) -> tuple[int, int]:
    return len(pair.negatives), len(pair.scores or ())


def _describe(shape: tuple[int, int]) -> str:
    return f"{shape[0]} negatives and {shape[1]} scores"


def _mend(negatives: int | None) -> str:
    return "give all as many" + (", or use the first N of each with `negatives=N`" if negatives is None else "")


# ------------------------------------------------------------------------------------ kept on disk


class StoredPairs(Sequence[Pair]):
    """Examples in an Arrow file that is memory-mapped: any number of them, read at random."""

    def __init__(self, folder: Path) -> None:
        about = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
        self.dataset: datasets.Dataset = datasets.Dataset.from_file(str(folder / "examples.arrow"))
        self.data_hash: str = about["data_hash"]
        self._negatives = [name for name in self.dataset.column_names if name.startswith("negative_")]

    @classmethod
    def write(cls, pairs: Iterable[Pair], folder: Path) -> "StoredPairs":
        """Write examples, all of one shape, to ``folder``; the columns stand in the order that the trainer reads them."""
        folder.mkdir(parents=True, exist_ok=True)
        try:
            data_hash = cls._write_arrow(pairs, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        write_whole(folder / "examples.json", json.dumps({"data_hash": data_hash}) + "\n")
        return cls(folder)

    @staticmethod
    def _write_arrow(pairs: Iterable[Pair], folder: Path) -> str:
        digest = hashlib.sha256()
        writer = None
        for pair in pairs:
            row: dict[str, Any] = {"query": pair.query, "positive": pair.positive}
            row |= {f"negative_{i}": text for i, text in enumerate(pair.negatives, 1)}
            if pair.scores is not None:
                row["label"] = list(pair.scores)
            digest.update(json.dumps(row).encode())
            if writer is None:
                features = {
                    name: datasets.List(datasets.Value("float32")) if name == "label" else datasets.Value("string") for name in row
                }
                writer = ArrowWriter(path=str(folder / "examples.arrow"), features=datasets.Features(features))
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


# --------------------------------------------------------------------------------------- one row


def _find_columns(row: dict[str, Any], place: str) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for role, names in _NAMES.items():
        found = next((name for name in names if name in row), None)
        if found:
            columns[role] = found
    numbered = sorted(filter(_NUMBERED.fullmatch, row), key=lambda name: int(name.rpartition("_")[2]))
    if numbered:
        columns["negative"] = numbered
    if not {"query", "query id"} & columns.keys():
        raise _lacks("query", row, place)
    if not {"positive", "positive id", "documents", "documents id"} & columns.keys():
        raise _lacks("positive", row, place)
    if {"documents", "documents id"} & columns.keys():
        if not {"scores", "label"} & columns.keys():
            raise _lacks("scores", row, place)
    elif {"negative", "negative id"} & columns.keys():  # a label beside negatives is sentence-transformers' name for scores
        label = columns.pop("label", None)
        if label:
            columns.setdefault("scores", label)
    elif "scores" in columns:  # of one document, so that there is nothing to compare it with: whether it is an answer
        score = columns.pop("scores")
        columns.setdefault("label", score)
    if len({"positive scores", "negative scores"} & columns.keys()) == 1:  # of no use without the other
        columns = {role: name for role, name in columns.items() if role not in ("positive scores", "negative scores")}
    return columns


def _lacks(role: str, row: dict[str, Any], place: str) -> DataError:
    names = ", ".join(_NAMES[role] + (_NAMES["label"] if role == "scores" else ()))
    ids = f" (or, for ids, {', '.join(_NAMES[f'{role} id'])})" if f"{role} id" in _NAMES else ""
    return DataError(f"{place}: no column for the {role}: name one of {names}{ids}; found: {', '.join(row) or 'nothing'}")


def _echo(columns: dict[str, Any], row: dict[str, Any]) -> str:
    used = [(role, name if isinstance(name, str) else f"{name[0]} ... {name[-1]}") for role, name in columns.items()]
    known = {name for names in columns.values() for name in ([names] if isinstance(names, str) else names)}
    unused = [name for name in row if name not in known]
    said = ", ".join(f'{role} from "{name}"' if role != name else role for role, name in used)
    return f"columns: {said}" + (f"; not used: {', '.join(unused)}" if unused else "")


def _examples(row: dict[str, Any], columns: dict[str, Any], lookup: "_Lookup", place: str, most: int | None) -> Iterator[Pair]:
    """The examples of a row: one for each positive."""

    def read(role: str) -> list[str] | None:
        if f"{role} id" in columns and role not in columns:
            return [lookup.text(role, id_, place) for id_ in _listed(row[columns[f"{role} id"]])]
        if role not in columns:
            return None
        names = [columns[role]] if isinstance(columns[role], str) else columns[role]
        return [_text(value, role, name, lookup, place) for name in names for value in _listed(row[name])]

    queries = read("query") or []
    if len(queries) != 1:
        raise DataError(f"{place}: {len(queries)} queries; a row has one")
    scores, labels, *split = (
        _scores(row, columns[role], place) if role in columns else None
        for role in ("scores", "label", "positive scores", "negative scores")
    )
    if labels and max(labels) <= 0:
        return
    documents = read("documents")
    if documents is not None:
        values = labels if scores is None else scores
        assert values is not None  # _find_columns saw to it
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
        raise DataError(f"{place}: no positive; a row needs at least one")
    if documents is None and not negatives:
        labels, scores = scores if labels is None else labels, None
        if labels is not None:
            if len(labels) not in (1, len(positives)):
                raise DataError(f"{place}: {len(labels)} labels for {len(positives)} positives; give each one")
            each = labels * len(positives) if len(labels) == 1 else labels
            positives = [text for text, label in zip(positives, each, strict=True) if label > 0]
    margins = None
    if split[0] is not None and split[1] is not None:
        if len(split[0]) != len(positives) or len(split[1]) != len(negatives):
            raise DataError(
                f"{place}: {len(split[0])} and {len(split[1])} scores for {len(positives)} positives and {len(negatives)} negatives"
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
    count = len(negatives) if most is None else most
    if len(negatives) < count:
        raise DataError(f"{place}: {len(negatives)} negatives, `negatives` asks for {count}")
    for i, positive in enumerate(positives):
        own = None if margins is None else tuple(margins[:count])
        if split[0] is not None and split[1] is not None:
            own = (split[0][i], *split[1][:count])
        yield Pair(queries[0], positive, tuple(negatives[:count]), own if count else None)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _text(value: Any, role: str, name: str, lookup: "_Lookup", place: str) -> str:
    if isinstance(value, dict):  # a passage with a title
        title, text = value.get("title") or "", value.get("text", value.get("contents"))
        value = f"{title} {text}".strip() if isinstance(title, str) and isinstance(text, str) else None
    if isinstance(value, int) and not isinstance(value, bool) and lookup.given:
        return lookup.text(role, value, place)
    if not isinstance(value, str):
        raise DataError(f'{place}: "{name}" is {json.dumps(value, default=str)[:40]}, no text; ids need `texts` to be looked up in')
    if not value.strip():
        raise DataError(f'{place}: "{name}" is an empty text; remove the row or give it one')
    if lookup.given and lookup.has(role, value):
        raise DataError(f'{place}: "{name}" is {value[:80]!r}, an id of `texts`; name the column "{_NAMES[f"{role} id"][0]}"')
    return whole_characters(value)


def _scores(row: dict[str, Any], name: str, place: str) -> list[float]:
    values = _listed(row[name])
    scores = []
    for value in values:
        try:
            scores.append(math.nan if isinstance(value, bool) else float(value))  # a cell of a table is a text
        except (TypeError, ValueError, OverflowError):
            scores.append(math.nan)
        if not math.isfinite(scores[-1]):
            raise DataError(f'{place}: "{name}" has {json.dumps(value, default=str)[:40]}, which is no finite number')
    return scores


# ----------------------------------------------------------------------------------- texts of ids


class _Texts(NamedTuple):
    """Where the texts of ids are."""

    name: str
    queries: Mapping[str, str]
    documents: Mapping[str, str]


class _Lookup:
    """Texts by id; their place is opened when the first id comes."""

    def __init__(self, open_texts: Callable[[], _Texts | None], given: bool) -> None:
        self._open = functools.cache(open_texts)
        self.given = given

    def text(self, role: str, id_: Any, place: str) -> str:
        texts = self._open()
        if texts is None:
            raise DataError(f"{place}: the row has ids; name with `texts` where their texts are")
        what = "query" if role == "query" else "document"
        try:
            text = (texts.queries if role == "query" else texts.documents)[str(id_)]
        except KeyError:
            raise DataError(f"{place}: the {what} {str(id_)!r} is not in {texts.name}") from None
        if not text.strip():
            raise DataError(f"{place}: the {what} {str(id_)!r} has an empty text in {texts.name}")
        return whole_characters(text)

    def has(self, role: str, id_: str) -> bool:
        texts = self._open()
        return texts is not None and id_ in (texts.queries if role == "query" else texts.documents)


def _texts(source: str) -> _Texts:
    return _texts_of(resolve(source, "texts"))


def _texts_of(source: Source) -> _Texts:
    if source.kind == "folder":
        return _beir_texts(source.at)
    if source.kind == "ir_datasets":
        return _ir_texts(source.name, source.at)
    if source.kind == "hub":
        return _hub_texts(source)
    raise DataError(f"{source.name}: texts of ids are queries and documents; name a collection that holds both")


def _beir_texts(folder: Place) -> _Texts:
    return _Texts(str(folder), read_queries(folder), {id_: document.full_text for id_, document in read_corpus(folder).items()})


class _Stored(Mapping[str, str]):
    """Texts, with their titles, in a memory-mapped table, found by a dictionary from id to row.

    Columns without a known name: ids are the first, texts the last.
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


def _hub_texts(source: Source) -> _Texts:
    queries, documents = (hub_dataset(str(source.at), config) for config in ("queries", "corpus"))
    return _Texts(source.name, _Stored(queries, QUERY_NAMES), _Stored(documents, TEXT_NAMES))


class _Documents(Mapping[str, str]):
    """An ir_datasets document store, which reads from disk."""

    def __init__(self, dataset: Any) -> None:
        self._dataset, self._store = dataset, dataset.docs_store()

    def __getitem__(self, id_: str) -> str:
        return self._store.get(id_).default_text()

    def __iter__(self) -> Iterator[str]:
        return (document.doc_id for document in self._dataset.docs_iter())

    def __len__(self) -> int:
        return self._dataset.docs_count()


def _ir_texts(source: str, dataset: Any) -> _Texts:
    return _Texts(source, {query.query_id: query.default_text() for query in dataset.queries_iter()}, _Documents(dataset))


# ----------------------------------------------------------------------------------- where rows are


def _open(name: str, progress: bool) -> tuple[Iterable[Row], Callable[[], _Texts | None]]:
    """The rows of a source, and where texts of ids would be."""
    source = resolve(name, "training data", "train")
    if source.kind == "python-docs":
        pairs = load_python_docs(progress=progress)[1]
        return ((f"{name}:{i}", {"query": pair.query, "positive": pair.positive}) for i, pair in enumerate(pairs, 1)), _nowhere
    if source.kind == "ir_datasets":
        return _ir_rows(name, source.at), functools.partial(_texts_of, source)
    if source.kind == "file":
        return _file_rows(source.at), functools.partial(_beside, source.at.parent)
    if source.kind == "folder":
        pairs_file = find_file(source.at, ["pairs.jsonl"])
        if pairs_file is not None:
            return _file_rows(pairs_file), functools.partial(_beside, source.at)
        if find_qrels(source.at, "train")[0] is not None:
            return _qrels_rows(source), _nowhere
        if find_file(source.at, CORPUS_FILES) is not None or not any(path.is_file() for path in source.at.iterdir()):
            raise DataError(f"{name}: nothing to train on; the folder needs pairs.jsonl or qrels/train.tsv")
    rows = hub_dataset(str(source.at), source.config, streaming=True)
    return _numbered(name, rows), functools.partial(_texts_of, source._replace(kind="hub"))


def _nowhere() -> None:
    return None


def _beside(folder: Place) -> _Texts | None:
    return None if find_file(folder, CORPUS_FILES) is None else _beir_texts(folder)


def _file_rows(path: Place) -> Iterator[Row]:
    return ((f"{path}:{number}", row) for number, row in rows(path))


def _numbered(source: str, rows: Iterable[dict[str, Any]]) -> Iterator[Row]:
    with as_data_error(source):
        for number, row in enumerate(rows, 1):
            yield f"{source}:{number}", row


def _qrels_rows(source: Source) -> Iterator[Row]:
    collection = load_collection(source.name, "train")
    for query_id, grades in collection.qrels.items():
        for document_id, grade in grades.items():
            if document_id in collection.corpus:
                row = {"query": collection.queries[query_id], "positive": collection.corpus[document_id].full_text, "label": grade}
                yield f"{source.name}, judgements of the query {query_id!r}", row


def _ir_rows(source: str, dataset: Any) -> Iterator[Row]:
    """Triples of ids if there are any, else judgements."""
    if dataset.has_docpairs():
        for number, triple in enumerate(dataset.docpairs_iter(), 1):
            ids = {"query_id": triple.query_id, "positive_id": triple.doc_id_a, "negative_id": triple.doc_id_b}
            yield f"{source}:{number}", ids
    elif dataset.has_qrels():
        for number, judged in enumerate(dataset.qrels_iter(), 1):
            yield f"{source}:{number}", {"query_id": judged.query_id, "positive_id": judged.doc_id, "label": judged.relevance}
    else:
        raise DataError(f"{source}: this ir_datasets id has neither triples nor judgements; name one that has, such as its /train")
