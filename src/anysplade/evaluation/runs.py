"""TREC run files: read and write them."""

import contextlib
import math
from pathlib import Path

from anysplade._common.files import write_whole
from anysplade.data.collections import Collection
from anysplade.data.sources import lines, trec_columns, whole_characters
from anysplade.errors import DataError, OutputError

Run = dict[str, dict[str, float]]  # score by query id and document id, the best document first


def read_run(path: str | Path) -> Run:
    """Read a TREC run file, compressed or not: query, Q0, document, rank, score, tag.

    Documents are ordered by score; those of equal score by rank, then by their order in the file.

    Raises:
        DataError: a malformed line, whose number the message has, or no line at all.
    """
    path = Path(path).expanduser()
    keys: dict[str, dict[str, tuple[float, float]]] = {}  # (-score, rank) by query id and document id
    with lines(path) as numbered:
        for number, line in numbered:
            parts = trec_columns(line)
            if not parts:
                continue
            if len(parts) != 6:
                raise DataError(f"{path}:{number}: {len(parts)} columns; a TREC run has query, Q0, document, rank, score, tag")
            ranking = keys.setdefault(parts[0], {})
            if parts[2] in ranking:
                raise DataError(f"{path}:{number}: duplicate document {parts[2]!r} for the query {parts[0]!r}; remove one")
            rank, score = (_number(path, number, name, text) for name, text in (("rank", parts[3]), ("score", parts[4])))
            ranking[parts[2]] = (-score, rank)
    if not keys:
        raise DataError(f"{path}: the run is empty; each line is query, Q0, document, rank, score, tag")
    return {
        query_id: {id_: -negative for id_, (negative, _) in sorted(ranking.items(), key=lambda item: item[1])}
        for query_id, ranking in keys.items()
    }


def _number(path: Path, line: int, name: str, text: str) -> float:
    with contextlib.suppress(ValueError):
        if not math.isnan(value := float(text)):
            return value
    raise DataError(f"{path}:{line}: the {name} {text[:40]!r} is not a number")


def write_run(path: str | Path, run: Run, tag: str = "anysplade") -> None:
    """Write a TREC run file. It has all digits of the scores, and ranks for ties, so that it measures the same when read."""
    rows = [
        f"{query_id} Q0 {document_id} {rank} {score!r} {tag}\n"
        for query_id, ranking in run.items()
        for rank, (document_id, score) in enumerate(ranking.items(), 1)
    ]
    write_whole(path, "".join(rows))


def require_trec_ids(collection: Collection) -> None:
    """Raise OutputError if a run file cannot hold an id of the collection: one with white space or half a character."""
    for role, ids in (("query", collection.queries), ("document", collection.corpus)):
        for id_ in ids:
            if id_.split() != [id_] or id_ != whole_characters(id_):
                fault = "white space" if id_.split() != [id_] else "a lone surrogate"
                raise OutputError(
                    f"{role} id {id_[:80]!r}: {fault} is not possible in a run file; rename the id, or give no `output`"
                )
