"""Batches for contrastive training, in which a text twice would be its own negative."""

import logging
from array import array
from collections.abc import Iterator, Sequence

import datasets
import numpy as np
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

from anysplade.errors import OptionError

logger = logging.getLogger(__name__)


def distinct_examples(dataset: datasets.Dataset, columns: Sequence[str], most: int) -> list[int]:
    """Positions of the first examples, up to ``most``, that have no text in common.

    Reads no further than it must; what stays in memory are the texts of these examples.
    """
    texts: set[str] = set()
    found: list[int] = []
    position = 0
    for part in dataset.select_columns(list(columns)).iter(1000):
        for row in zip(*part.values(), strict=True):
            if texts.isdisjoint(row):
                texts.update(row)
                found.append(position)
                if len(found) == most:
                    return found
            position += 1
    return found


def check_batch_size(dataset: datasets.Dataset, batch_size: int, processes: int, contrastive: bool, source: str) -> None:
    """Refuse a batch size that the examples cannot fill, in a step of all processes.

    Args:
        dataset: columns ``query``, ``positive`` and any negatives.
        contrastive: a batch may not have a text twice.
        source: what to call the data.

    Raises:
        OptionError: it names the batch size that works, and what else helps.
    """

    def fill(columns: list[str]) -> int:
        """Examples that one batch can have, up to its size."""
        return len(distinct_examples(dataset, columns, batch_size)) if contrastive else min(len(dataset), batch_size)

    pair = ["query", "positive"]
    columns = [name for name in dataset.column_names if name != "label"]
    found = fill(columns)
    if found == batch_size:
        return
    works = found - found % processes
    fixes = [f"`batch_size={works}`"] if works >= 2 else []
    alone = fill(pair)
    alone -= alone % processes
    if alone > max(works, 1):  # it is the negatives that repeat
        fixes.append("`negatives=0`" + ("" if alone == batch_size else f" `batch_size={alone}`"))
    if not fixes:
        fixes = ["examples with other documents"]
    common, documents = "", ""
    if contrastive:
        different = len({hash(text) for part in dataset.select_columns(["positive"]).iter(1000) for text in part["positive"]})
        common, documents = " without a text in common", f" with {different:,} distinct positives"
    raise OptionError(
        f"{source}: a batch needs {batch_size} examples{common}, and {len(dataset):,} examples{documents} give {found}; "
        f"use {' or '.join(fixes)}"
    )


class DistinctBatches(NoDuplicatesBatchSampler):
    """As many batches an epoch as the examples would fill without duplicates, each of them full.

    Where texts repeat, sentence-transformers' sampler ends an epoch early, and the trainer then ends the whole run early,
    without an error. Here the epoch's batches come again instead; a warning tells it once.
    """

    _warned = False

    def __iter__(self) -> Iterator[list[int]]:
        given = array("q")  # the epoch's examples in order: 8 bytes each
        for batch in super().__iter__():
            given.extend(batch)
            yield batch
        size, missing = self.batch_size, len(self) - len(given) // self.batch_size
        used = len(np.unique(np.frombuffer(given, np.int64))) if given else 0
        if used < len(self) * size and not self._warned:
            self._warned = True
            logger.warning(
                "texts repeat, so that an epoch's %s batches use %s of %s examples, some of them several times; "
                "a smaller `batch_size` uses more",
                f"{len(self):,}",
                f"{used:,}",
                f"{len(self.dataset):,}",
            )
        if not given:  # no shuffle gave a batch, as it may be where few sets of examples make one
            given.extend(distinct_examples(self.dataset, self.dataset.column_names, size))
        for i in range(missing):
            start = i * size % len(given)
            yield given[start : start + size].tolist()
