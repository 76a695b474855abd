"""Batches for contrastive training, in which a repeated text would be its own negative."""

import logging
from array import array
from collections.abc import Iterator, Sequence

import datasets
import numpy as np
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

from anysplade.errors import OptionError

logger = logging.getLogger(__name__)


def distinct_examples(dataset: datasets.Dataset, columns: Sequence[str], most: int) -> list[int]:
    """Positions of the first examples, up to ``most``, that have no text in common; only their texts are kept in memory."""
    texts: set[str] = set()
    found: list[int] = []
    rows = (row for part in dataset.select_columns(list(columns)).iter(1000) for row in zip(*part.values(), strict=True))
    for position, row in enumerate(rows):
        if texts.isdisjoint(row):
            texts.update(row)
            found.append(position)
            if len(found) == most:
                break
    return found


def check_batch_size(dataset: datasets.Dataset, batch_size: int, processes: int, contrastive: bool, source: str) -> None:
    """Raise OptionError, with the largest batch size that works, unless the examples can fill a batch of all processes.

    The columns are ``query``, ``positive`` and any negatives; in contrastive training the texts of a batch must be distinct.
    """

    def fill(columns: list[str]) -> int:
        """The number of examples that fit in one batch."""
        return len(distinct_examples(dataset, columns, batch_size)) if contrastive else min(len(dataset), batch_size)

    columns = [name for name in dataset.column_names if name != "label"]
    found = fill(columns)
    if found == batch_size:
        return
    works = found - found % processes
    fixes = [f"`batch_size={works}`"] if works >= 2 else []
    alone = fill(["query", "positive"])
    alone -= alone % processes
    if alone > max(works, 1):  # the negatives repeat
        fixes.append("`negatives=0`" + ("" if alone == batch_size else f" `batch_size={alone}`"))
    common, documents = "", ""
    if contrastive:
        different = len({hash(text) for part in dataset.select_columns(["positive"]).iter(1000) for text in part["positive"]})
        common, documents = " without a text in common", f" with {different:,} distinct positives"
    raise OptionError(
        f"{source}: a batch needs {batch_size} examples{common}, and {len(dataset):,} examples{documents} give {found}; "
        f"use {' or '.join(fixes) or 'examples with other documents'}"
    )


class DistinctBatches(NoDuplicatesBatchSampler):
    """A sampler that always gives a full epoch of full batches.

    Where texts repeat, sentence-transformers' sampler ends an epoch early, and the trainer then silently ends the whole run. This
    one repeats the epoch's batches instead, and warns once.
    """

    _warned = False

    def __iter__(self) -> Iterator[list[int]]:
        given = array("q")  # positions of the epoch's examples, 8 bytes each
        for batch in super().__iter__():
            given.extend(batch)
            yield batch
        size, missing = self.batch_size, len(self) - len(given) // self.batch_size
        seen = np.zeros(len(self.dataset), np.bool_)
        if given:
            seen[np.frombuffer(given, np.int64)] = True
        used = int(seen.sum())
        if used < len(self) * size and not self._warned:
            self._warned = True
            logger.warning(
                "texts repeat, so an epoch's %s batches use %s of %s examples, some of them several times; "
                "a smaller `batch_size` uses more",
                f"{len(self):,}",
                f"{used:,}",
                f"{len(self.dataset):,}",
            )
        if not given:  # by chance the shuffle gave no batch
            given.extend(distinct_examples(self.dataset, self.dataset.column_names, size))
        for i in range(missing):
            start = i * size % len(given)
            yield given[start : start + size].tolist()
