"""TREC run files: read and write them."""

import contextlib
import logging
import math
import re
from collections.abc import Set
from pathlib import Path

from anysplade._common.files import user_path, write_atomic
from anysplade.data.collections import Collection
from anysplade.data.rows import lines, trec_columns
from anysplade.data.text import replace_surrogates
from anysplade.errors import DataError, OutputError

logger = logging.getLogger(__name__)

Run = dict[str, dict[str, float]]  # score by query id and document id, the best document first

_MOST = 0.9  # of the ids that have to match; fewer are worth a warning


def read_run(path: str | Path) -> Run:
    """Read a TREC run file, compressed or not: query, Q0, document, rank, score, tag.

    Documents are ordered by score; those of equal score by rank, then by their order in the file.

    Raises:
        DataError: a malformed line, whose number the message has, or no line at all.
    """
    path = user_path(path)
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


def as_name(text: str) -> str:
    """A text, such as a model's path, as one readable word: for a file's name or a run's tag."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")[-80:] or "unnamed"


def write_run(path: str | Path, run: Run, model: str) -> None:
    """Write a TREC run file. It has all digits of the scores, and ranks for ties, so that it measures the same when read.

    Args:
        model: what made the run: the tag, made one word; reading ignores it.
    """
    tag = as_name(model)
    rows = [
        f"{query_id} Q0 {document_id} {rank} {score!r} {tag}\n"
        for query_id, ranking in run.items()
        for rank, (document_id, score) in enumerate(ranking.items(), 1)
    ]
    write_atomic(path, "".join(rows))


def check_run(place: str | Path, run: Run, collection: Collection) -> None:
    """Check that a run belongs to a collection: by the ids of the judged queries, and of the documents that it ranks for them.

    Raises:
        DataError: it has no such query, or no document of the corpus.
    """
    judged, name = collection.qrels.keys(), collection.name
    require_match(place, "query", f"queries of {name} are in the run", f"of {name}", judged, judged & run.keys())
    ranked = dict.fromkeys(id_ for query_id in judged for id_ in run.get(query_id, ())).keys()
    require_match(place, "document", f"documents of the run are in {name}", f"of {name}", ranked, ranked & collection.corpus.keys())


def require_match(place: object, kind: str, counted: str, whose: str, wanted: Set[str], found: Set[str]) -> None:
    """Raise DataError if none of the wanted ids is found, and warn of the share if it is less than nine in ten.

    Args:
        place: the run, or the two.
        kind, counted, whose: of what the ids are, for the messages.
    """
    missing = next((id_ for id_ in wanted if id_ not in found), None)
    if not found:
        raise DataError(f"{place}: has no {kind} {whose}, such as {missing!r}; name the collection that it was made on")
    if len(found) < _MOST * len(wanted):
        numbers = len(found), len(wanted), counted, 100 * len(found) / len(wanted), missing
        logger.warning("%s: only %d of %d %s (%.2g %%); %r is not, for example", place, *numbers)


def require_trec_ids(collection: Collection) -> None:
    """Raise OutputError if a run file cannot hold an id of the collection: one with white space or half a character."""
    for role, ids in (("query", collection.queries), ("document", collection.corpus)):
        for id_ in ids:
            if id_.split() != [id_] or id_ != replace_surrogates(id_):
                fault = "white space" if id_.split() != [id_] else "a lone surrogate"
                raise OutputError(
                    f"{role} id {id_[:80]!r}: {fault} is not possible in a run file; rename the id, or give no `output`"
                )
