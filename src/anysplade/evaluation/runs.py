"""Read, write and check TREC run files."""

import contextlib
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path

from anysplade._common.files import user_path, whole_file
from anysplade.data.collections import Collection
from anysplade.data.rows import lines, trec_columns
from anysplade.data.text import replace_surrogates
from anysplade.errors import DataError, OutputError

logger = logging.getLogger(__name__)

Run = dict[str, dict[str, float]]  # score by query id and document id, the best document first

_COLUMNS = "query, Q0, document, rank, score, tag"
_EXPECTED_SHARE = 0.9  # of the ids that should match; below it there is a warning


def read_run(path: str | Path) -> Run:
    """Read a TREC run file, compressed or not; documents are ordered by score, then by rank, then by their order in the file."""
    path = user_path(path)
    keys: dict[str, dict[str, tuple[float, float]]] = {}  # (-score, rank) by query id and document id
    with lines(path) as numbered:
        for number, line in numbered:
            parts = trec_columns(line)
            if not parts:
                continue
            if len(parts) != 6:
                raise DataError(f"{path}:{number}: {len(parts)} columns; a TREC run has {_COLUMNS}")
            query_id, _, document_id, rank, score, _ = parts
            ranking = keys.setdefault(query_id, {})
            if document_id in ranking:
                raise DataError(f"{path}:{number}: duplicate document {document_id!r} for the query {query_id!r}; remove one")
            ranking[document_id] = (-_number(path, number, "score", score), _number(path, number, "rank", rank))
    if not keys:
        raise DataError(f"{path}: the run is empty; each line has {_COLUMNS}")
    return {
        query_id: {id_: -negative for id_, (negative, _) in sorted(ranking.items(), key=lambda item: item[1])}
        for query_id, ranking in keys.items()
    }


def _number(path: Path, line: int, name: str, text: str) -> float:
    with contextlib.suppress(ValueError):
        if not math.isnan(value := float(text)):
            return value
    raise DataError(f"{path}:{line}: the {name} {text[:40]!r} is not a number")


def as_name(text: str) -> str:
    """Turn a text, such as a model's path, into one readable word for the name of a file or the tag of a run."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")[-80:] or "unnamed"


def write_run(path: str | Path, run: Run, model: str) -> None:
    """Write a TREC run file, tagged with its model; all digits of the scores and distinct ranks give the same measures again."""
    write_rankings(path, run.items(), model)


def write_rankings(path: str | Path, rankings: Iterable[tuple[str, Mapping[str, float]]], model: str) -> None:
    """``write_run`` for rankings that come one by one and need not fit into memory; their ids are checked."""
    tag = as_name(model)
    with whole_file(path) as file:
        for query_id, ranking in rankings:
            require_trec_id("query", query_id)
            for rank, (document_id, score) in enumerate(ranking.items(), 1):
                require_trec_id("document", document_id)
                file.write(f"{query_id} Q0 {document_id} {rank} {score!r} {tag}\n".encode())


def check_run(source: str | Path, run: Run, collection: Collection) -> None:
    """Require that a run belongs to a collection, by the ids of the judged queries and of the documents ranked for them."""
    judged, name = collection.qrels.keys(), collection.name
    require_match(source, f"queries of {name} are in the run", judged, judged & run.keys())
    ranked = dict.fromkeys(id_ for query_id in judged for id_ in run.get(query_id, ())).keys()
    require_match(source, f"documents of the run are in {name}", ranked, ranked & collection.corpus.keys())


def require_match(
    source: object, expected: str, ids: Set[str], found: Set[str], fix: str = "name the collection that the run was made on"
) -> None:
    """Require that some of the ids were found, and warn if few were; ``expected`` is such as "queries are in both runs"."""
    require_share(source, expected, len(ids), len(found), lambda: next((id_ for id_ in ids if id_ not in found), None), fix)


def require_share(source: object, expected: str, count: int, found: int, missing: Callable[[], str | None], fix: str) -> None:
    """``require_match`` by the numbers of ids; ``missing`` looks for one that was not found."""
    if not found:
        fault = f"none of the {count} {expected} ({missing()!r} is missing)"
        raise DataError(f"{source}: {fault}; {fix}")
    if found < _EXPECTED_SHARE * count:
        share = f"{100 * found / count:.2g} %"
        logger.warning("%s: only %d of %d %s (%s; %r is missing)", source, found, count, expected, share, missing())


def require_trec_ids(collection: Collection) -> None:
    """Require that a run file can hold all ids of the collection: without white space or half of a character."""
    for role, ids in (("query", collection.queries), ("document", collection.corpus)):
        for id_ in ids:
            require_trec_id(role, id_)


def require_trec_id(role: str, id_: str) -> None:
    fault = "white space" if id_.split() != [id_] else "a lone surrogate" if id_ != replace_surrogates(id_) else None
    if fault:
        raise OutputError(f"{role} id {id_[:80]!r}: {fault} is not possible in a run file; rename the id, or give no `output`")
