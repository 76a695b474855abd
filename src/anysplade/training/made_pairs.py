"""What ``adapt`` and ``distil`` share: pairs made from a corpus, some of them held out to judge by, and the record of the call."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anysplade._common.files import whole_file
from anysplade._common.outputs import earlier_call, is_whole, require_unused
from anysplade.data.collections import Collection
from anysplade.data.corpus import Document
from anysplade.data.document_pairs import make_pairs
from anysplade.data.names import PAIR_KINDS
from anysplade.data.rows import rows as read_rows
from anysplade.errors import AnyspladeError, DataError
from anysplade.training.judging import held_out

PAIRS, TRAINING = "pairs.jsonl", "training.jsonl"  # files in the output: the made pairs, and those that are trained on

_HELD_OUT = 0.1  # share of the documents that are held out for the comparison, without a collection to judge by
_MOST_HELD_OUT = 1000
_FEWEST_HELD_OUT = 20


def hold_out(
    corpus: str, output: Path, documents: Mapping[str, Document], kinds: Sequence[str], progress: bool
) -> tuple[Collection, dict[str, str], set[str]]:
    """A collection of queries made from some documents, chosen by the hash of their ids; the queries' kinds; and these ids.

    The queries are of all kinds, also of those that are not trained on. ``PAIRS`` of ``output`` has the pairs of these ``kinds``.
    """
    pairs = output / PAIRS
    if set(kinds) != set(PAIR_KINDS):
        pairs = output / "judging.jsonl"
        make_pairs(corpus, pairs, progress=progress)
    rows = [row for _, row in read_rows(pairs)]
    held = chosen_to_hold((row["document_id"] for row in rows), corpus)
    return *held_out(rows, documents, held), held


def chosen_to_hold(documents: Iterable[str], source: str) -> set[str]:
    """A tenth of the ids, or texts, of documents that have pairs, at most 1,000, by their hash; DataError if it is below 20."""
    ordered = sorted(set(documents), key=lambda id_: hashlib.sha256(json.dumps(id_).encode()).digest())
    held = set(ordered[: min(_MOST_HELD_OUT, round(_HELD_OUT * len(ordered)))])
    if len(held) < _FEWEST_HELD_OUT:
        raise DataError(
            f"{source}: {len(ordered)} documents have pairs, too few to hold some out to judge by; name a collection with `judged`"
        )
    return held


def rows_to_train_on(output: Path, held: set[str]) -> Iterator[dict[str, str]]:
    """The made pairs of the documents that are not held out."""
    return (row for _, row in read_rows(output / PAIRS) if row["document_id"] not in held)


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with whole_file(file) as written:
        written.writelines(json.dumps(row).encode() + b"\n" for row in rows)


def earlier_record(output: Path, begun: str, done: str, about: dict[str, Any], inputs: Mapping[str, str]) -> dict[str, Any] | None:
    """The record of an earlier call with the same options, if it is finished and its model is undamaged.

    Args:
        begun: name of the file that is written at the start of a call.
        done: name of the file with its result.
        about: options and hashes, which must be those of the earlier call.
        inputs: entries of ``about`` that are no options, and what they are called in a message.
    """
    if not (output / begun).is_file():
        require_unused(output, "lock")
        return None
    earlier_call(output / begun, about, inputs)
    record = earlier_call(output / done, about, inputs)
    return record if record is not None and is_whole(output / "model", record.get("files", {})) else None


@contextmanager
def nothing_left_by_mistakes(output: Path, begun: bool) -> Iterator[None]:
    """Remove the folder of a call that ends in an error, unless an earlier call began it or its training has begun."""
    try:
        yield
    except AnyspladeError:
        if not (begun or (output / "training" / "run.json").exists()):  # nothing to continue
            shutil.rmtree(output)
        raise
