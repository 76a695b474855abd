"""What mining and scoring read, in memory-mapped files: examples, and the distinct documents with their numbers."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np

from anysplade._common.hashing import DataHash
from anysplade.data.collections import Pair
from anysplade.data.mapped_texts import MappedTexts
from anysplade.data.pairs import read_pairs, read_parts
from anysplade.data.stored_pairs import MixedFormsError, StoredPairs


@contextmanager
def scratch_folder(parts: Path) -> Iterator[Path]:
    """A temporary folder in ``parts``, which this process has locked, or among the system's if that one cannot be written."""
    for left in parts.glob("data-*"):  # of a killed process
        shutil.rmtree(left, ignore_errors=True)
    place = parts if os.access(parts, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="data-", dir=place, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def store_examples(data: str, texts: str | None, folder: Path, progress: bool) -> StoredPairs:
    """The examples of a source, read once and mapped."""
    try:
        return StoredPairs.write(read_parts(data, texts=texts, progress=progress), folder / "examples")
    except MixedFormsError:
        return StoredPairs.write(read_pairs(data, texts=texts, progress=progress), folder / "examples")


class Documents:
    """Distinct texts in the order of their first occurrence; in memory are a hash and a number for each."""

    def __init__(self, texts: Iterable[str], folder: Path, name: str = "distinct") -> None:
        self._numbers: dict[bytes, int] = {}
        self.texts = MappedTexts.write(filter(self._is_new, texts), folder, name)

    def _is_new(self, text: str) -> bool:
        count = len(self._numbers)
        return self._numbers.setdefault(_digest(text), count) == count

    def number(self, text: str) -> int:
        """The number of a text that is among them."""
        return self._numbers[_digest(text)]


class Positives:
    """The numbers of the documents that are positives of a query, 28 bytes per example."""

    def __init__(self, pairs: Iterable[Pair], documents: Documents) -> None:
        found = np.fromiter(
            chain.from_iterable((*_words(pair.query), documents.number(pair.positive)) for pair in pairs), np.int64
        ).reshape(-1, 3)
        self._found = found[np.lexsort((found[:, 1], found[:, 0]))]
        self._first = np.ascontiguousarray(self._found[:, 0])

    def of(self, query: str) -> set[int]:
        first, second = _words(query)
        rows = self._found[slice(*(int(np.searchsorted(self._first, first, side)) for side in ("left", "right")))]
        return set(rows[rows[:, 1] == second, 2].tolist())


def data_digest(pairs: Sequence[Pair], documents: Sequence[str]) -> str:
    """The hash of examples and then documents."""
    return DataHash(chain(pairs, documents)).hexdigest()


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _words(text: str) -> tuple[int, int]:
    digest = _digest(text)
    return int.from_bytes(digest[:8], "little", signed=True), int.from_bytes(digest[8:], "little", signed=True)
