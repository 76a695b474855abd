"""Training examples, read from files, collections, ir_datasets and the hub; ``pair_rows`` has the formats of a row."""

import functools
import logging
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

from anysplade.data.collections import Pair, load_collection, load_python_docs
from anysplade.data.external import as_data_error, hub_dataset
from anysplade.data.lookup import Lookup, open_texts, own_texts
from anysplade.data.names import CORPUS_FILES, Source, resolve
from anysplade.data.numbered_pairs import IdColumns
from anysplade.data.pair_rows import Columns, describe_columns, difference, find_columns, recognized, row_pairs, select_passages
from anysplade.data.qrels import find_qrels
from anysplade.data.rows import Row, find_file, rows
from anysplade.errors import DataError

logger = logging.getLogger(__name__)

_SAMPLED = 64  # examples for calibrating a head
_CHECKED = 20  # examples that are checked for ids instead of texts

_NUMBERED = 2**14  # rows of ids that are looked up at once

Part: TypeAlias = Sequence[Pair]  # a list, or NumberedPairs
_PlacedRow = tuple[str, dict[str, Any]]  # place for messages, such as file and line, and values by column name


def load_pairs(source: str | Path, *, texts: str | None = None, negatives: int | None = None, progress: bool = False) -> list[Pair]:
    """Read all training examples into a list; ``source``, ``texts``, ``negatives`` and errors are as for ``read_pairs``."""
    return list(read_pairs(source, texts=texts, negatives=negatives, progress=progress))


def read_pairs(
    source: str | Path, *, texts: str | None = None, negatives: int | None = None, progress: bool = False
) -> Iterator[Pair]:
    """Read and check training examples one by one; only the texts of ids are kept in memory.

    Args:
        source: a JSONL, CSV, TSV or Parquet file, compressed or not; a BEIR folder, whose ``pairs.jsonl`` is read, or else
            ``qrels/train.tsv`` with grades as labels; an ir_datasets id; the folder or hub id of a dataset, as ``id`` or
            ``id:config``; or ``"python-docs"``.
        texts: a collection with the texts of ids: a BEIR folder, an ir_datasets id, or a hub dataset with the configs
            ``queries`` and ``corpus``. None: the source itself.
        negatives: how many of each example's negatives to use. None: all, and every example must have the same number.
        progress: show a progress bar while python-docs is read.

    Raises:
        DataError: there is nothing to train on, a column of texts has ids, or a row cannot be used; the message names file
            and line.
    """
    yield from chain.from_iterable(read_parts(source, texts=texts, negatives=negatives, progress=progress))


def read_parts(
    source: str | Path, *, texts: str | None = None, negatives: int | None = None, progress: bool = False
) -> Iterator[Part]:
    """The examples of ``read_pairs`` in parts, which are numbers of mapped texts where the rows have ids."""
    given_rows, own = _open(source, progress)
    lookup = Lookup(lambda: open_texts(resolve(texts, "texts")) if texts else own and own_texts(own), bool(texts))
    parts = _read(source, given_rows, lookup, negatives)
    first: list[Part] = []
    while sum(map(len, first)) < _CHECKED and (part := next(parts, None)) is not None:
        first.append(part)
    _require_texts(source, list(islice(chain.from_iterable(first), _CHECKED)), lookup)
    yield from chain(first, parts)


def _read(source: str | Path, given_rows: Iterable[_PlacedRow], lookup: Lookup, negatives: int | None) -> Iterator[Part]:
    """The examples of rows, which must all have the same columns and the same numbers of negatives and scores."""
    columns: Columns = {}
    names: set[str] = set()
    ids: IdColumns | None = None
    expected = None
    used = irrelevant = 0  # rows
    left = iter(given_rows)
    while placed := list(islice(left, _NUMBERED if ids else 1)):
        if ids is not None and (numbered := ids.read([row for _, row in placed])) is not None:
            used += len(placed)
            yield numbered
            continue
        for place, given in placed:
            row = select_passages({name: value for name, value in given.items() if value is not None})
            if not columns:
                columns, names = find_columns(row, place), recognized(row)
                if described := describe_columns(columns, row):
                    _log_columns(str(source), described)
            elif recognized(row) != names:
                raise DataError(f"{place}: {difference(recognized(row), names)}; give every row the same columns")
            pairs = list(row_pairs(row, columns, lookup, place, negatives))
            for pair in pairs:
                shape = f"{len(pair.negatives)} negatives and {len(pair.scores or ())} scores"
                if shape != (expected := expected or shape):
                    first = "" if negatives is not None else ", or use the first N of each with `negatives=N`"
                    raise DataError(f"{place}: {shape}, but the rows before have {expected}; give all the same number{first}")
            used += bool(pairs)
            irrelevant += not pairs
            if used + irrelevant == 1 and (ids := IdColumns.of(row, columns, lookup, negatives)) is not None:
                pairs = ids.read([given]) or pairs  # type: ignore[assignment]
            if pairs:
                yield pairs
    if irrelevant:
        logger.info("%s: %s of %s rows left out: their labels are 0 or below", source, f"{irrelevant:,}", f"{used + irrelevant:,}")
    if expected is None:
        fix = "a row needs a document with a label above 0" if irrelevant else "each row needs query and positive"
        raise DataError(f"{source}: no training pair in it; {fix}")


@functools.lru_cache(maxsize=1)  # once, although mining reads the data twice
def _log_columns(source: str, described: str) -> None:
    logger.info("%s: %s", source, described)


def _require_texts(source: str | Path, pairs: Sequence[Pair], lookup: Lookup) -> None:
    """Raise DataError if the texts of examples are ids: documents that are only numbers, or ids of the source's own collection.

    Queries can be meant to be numbers, such as part numbers, and texts can be single words with a digit; both get a warning.
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
            message = "%s: the first texts of %s are single words such as %r; if they are ids, name the column %s_id"
            logger.warning(message, source, role, texts[0][:80], role)


def _most(texts: Sequence[str], matches: Callable[[str], bool]) -> bool:
    """Whether nine in ten of the texts match."""
    return bool(texts) and sum(matches(text.strip()) for text in texts) >= 0.9 * len(texts)


def _open(name: str | Path, progress: bool) -> tuple[Iterable[_PlacedRow], Source | None]:
    """The rows of a source, and where the texts of their ids are; None if the rows have texts."""
    source = resolve(name, "training data", "train")
    if source.kind == "python-docs":
        pairs = load_python_docs(progress=progress)[1]
        return _placed(name, enumerate(({"query": pair.query, "positive": pair.positive} for pair in pairs), 1)), None
    if source.kind == "ir_datasets":
        return _placed(name, enumerate(_ir_rows(source), 1)), source
    if source.kind == "file":
        return _placed(source.at, rows(source.at)), source
    if source.kind == "folder":
        pairs_file = find_file(source.at, ["pairs.jsonl"])
        if pairs_file is not None:
            return _placed(pairs_file, rows(pairs_file)), source
        if find_qrels(source.at, "train")[0] is not None:
            return _qrels_rows(source), None
        if find_file(source.at, CORPUS_FILES) is not None or not any(path.is_file() for path in source.at.iterdir()):
            fix = f", and anysplade pairs {name} --out PAIRS.jsonl makes some" if find_file(source.at, CORPUS_FILES) else ""
            raise DataError(f"{name}: no training pairs in it; it needs pairs.jsonl or qrels/train.tsv{fix}")
    return _placed(name, enumerate(_streamed_rows(source), 1)), source._replace(kind="hub")


def _placed(place: object, numbered: Iterable[Row]) -> Iterator[_PlacedRow]:
    return ((f"{place}:{number}", row) for number, row in numbered)


def _streamed_rows(source: Source) -> Iterator[dict[str, Any]]:
    with as_data_error(source.name):  # a streamed dataset raises its errors while it is read
        yield from hub_dataset(str(source.at), source.config, streaming=True)


def _qrels_rows(source: Source) -> Iterator[_PlacedRow]:
    collection = load_collection(source, "train")
    for query_id, grades in collection.qrels.items():
        for document_id, grade in grades.items():
            if document_id in collection.corpus:
                row = {"query": collection.queries[query_id], "positive": collection.corpus[document_id].full_text, "label": grade}
                yield f"{source.name}, judgements of the query {query_id!r}", row


def _ir_rows(source: Source) -> Iterator[dict[str, Any]]:
    """Triples of ids if an ir_datasets dataset has them, else judgements."""
    if source.at.has_docpairs():
        for triple in source.at.docpairs_iter():
            yield {"query_id": triple.query_id, "positive_id": triple.doc_id_a, "negative_id": triple.doc_id_b}
    elif source.at.has_qrels():
        for judged in source.at.qrels_iter():
            yield {"query_id": judged.query_id, "positive_id": judged.doc_id, "label": judged.relevance}
    else:
        raise DataError(f"{source}: this ir_datasets id has no triples or judgements; name one that has, such as its /train")


def sample_pairs(pairs: Sequence[Pair], seed: int = 0) -> tuple[list[str], list[str]]:
    """The queries and documents of up to 64 training pairs."""
    sampled = [pairs[i] for i in _sample(len(pairs), seed)]
    return [pair.query for pair in sampled], [pair.positive for pair in sampled]


def _sample(count: int, seed: int) -> list[int]:
    return random.Random(seed).sample(range(count), min(_SAMPLED, count))


def read_sample(source: str | Path, seed: int = 0, progress: bool = False) -> tuple[list[str], list[str]]:
    """``sample_pairs`` of a source, which is read twice instead of kept in memory.

    The sample is that of a training on the same data, so both see the same head; a reservoir would draw another one.
    """
    count = sum(map(len, read_parts(source, progress=progress)))
    places = _sample(count, seed)
    wanted = set(places)
    found = {i: pair for i, pair in enumerate(read_pairs(source, progress=progress)) if i in wanted}
    return [found[i].query for i in places], [found[i].positive for i in places]
