"""The vectors of an index by term, in files that every process maps: they cost no memory of its own, and no reading in advance.

The database names the folder with the postings that it uses, so that they and the changes made after them are of one state.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import sparse

from anysplade.search.exact import Postings, highest

_BLOCK = 2**24  # postings that are sorted together, in about 600 MiB
_FILES = ("positions", "indptr", "documents", "weights")

Vector = tuple[int, bytes, bytes]  # position, terms and weights


class Located(NamedTuple):
    """Postings and the positions of their documents."""

    postings: Postings
    positions: np.ndarray  # (documents,) int64, rising


def read_postings(folder: Path) -> Located:
    """Map the postings in a folder; raises OSError or ValueError if they are missing or damaged."""
    positions, indptr, documents, weights = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in _FILES)
    if not len(documents) == len(weights) == indptr[-1]:
        raise ValueError(f"{folder}: the postings have different lengths")
    return Located(Postings(indptr, documents, weights, len(positions)), positions)


def collect(vectors: Iterable[Vector]) -> Located:
    """Postings in memory."""
    rows = list(vectors)
    found = _transposed([row[1:] for row in rows])
    return Located(found, np.array([row[0] for row in rows], np.int64))


def best_of(scored: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> list[tuple[int, float]]:
    """The k highest scores above 0 of documents at positions."""
    found: list[tuple[int, float]] = []
    for positions, scores in scored:
        best, values = highest(scores, k)
        found += zip(positions[best].tolist(), values.tolist(), strict=True)
    return sorted(found, key=lambda hit: (-hit[1], hit[0]))[:k]


def clear(positions: np.ndarray, scores: np.ndarray, among: np.ndarray, keep: bool = False) -> None:
    """Set the scores at some positions, or at all others, to 0; both arrays of positions rise."""
    among = among[among <= positions[-1]]
    rows = np.searchsorted(positions, among)
    rows = rows[positions[rows] == among]
    kept = scores[rows] if keep else 0.0
    if keep:
        scores[:] = 0.0
    scores[rows] = kept


def write_postings(
    folder: Path, vectors: Callable[[], Iterable[Vector]], require_free: Callable[[int], None], name: str
) -> str | None:
    """Write the postings of all vectors, which are read twice, into a new folder in ``folder``, and return its name.

    Memory is bounded by a block of vectors, not by their number. None if there are no postings.

    Args:
        vectors: begins a pass over position, terms and weights of the documents, in the order of the positions.
        require_free: raises an error unless this number of bytes is free.
        name: beginning of the folder's name.
    """
    counts, positions = _count(vectors())
    indptr = np.concatenate([[0], np.cumsum(counts)])
    if not indptr[-1]:
        return None
    require_free(8 * int(indptr[-1] + len(positions) + len(indptr)))
    name = f"{name}-{secrets.token_hex(4)}"
    work = folder / f".{name}"
    work.mkdir(parents=True)
    try:
        np.save(work / "positions.npy", positions)
        np.save(work / "indptr.npy", indptr)
        documents = _create(work / "documents.npy", np.int32, int(indptr[-1]))
        weights = _create(work / "weights.npy", np.float32, int(indptr[-1]))
        cursor, first = indptr[:-1].copy(), 0
        for block in _blocks(vectors()):
            found = _transposed([row[1:] for row in block], len(counts))
            sizes = np.diff(found.indptr)
            places = np.arange(len(found.documents)) + np.repeat(cursor - found.indptr[:-1], sizes)
            documents[places], weights[places] = found.documents + first, found.weights
            cursor += sizes
            first += len(block)
        del documents, weights
        for path in work.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        work.rename(folder / name)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return name


def count_terms(vectors: Iterable[Vector]) -> np.ndarray:
    """The number of vectors that have each term, (largest term + 1,)."""
    return _count(vectors)[0]


def remove_others(folder: Path, name: str | None) -> None:
    """Remove all postings in a folder but these; a process that has mapped others keeps them."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.name != name:
                shutil.rmtree(path, ignore_errors=True)


def _count(vectors: Iterable[Vector]) -> tuple[np.ndarray, np.ndarray]:
    """The number of postings of each term, (largest term + 1,), and the positions, (documents,)."""
    counts, positions = np.zeros(0, np.int64), []
    for block in _blocks(vectors):
        found = np.bincount(np.frombuffer(b"".join(row[1] for row in block), np.int32), minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
        positions.append(np.array([row[0] for row in block], np.int64))
    return counts, np.concatenate(positions) if positions else np.zeros(0, np.int64)


def _blocks(vectors: Iterable[Vector]) -> Iterator[list[Vector]]:
    block: list[Vector] = []
    size = 0
    for vector in vectors:
        block.append(vector)
        size += len(vector[1]) // 4
        if size >= _BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def _transposed(rows: list[tuple[bytes, bytes]], width: int | None = None) -> Postings:
    indptr = np.cumsum([0, *(len(terms) // 4 for terms, _ in rows)], dtype=np.int64)
    columns = np.frombuffer(b"".join(terms for terms, _ in rows), np.int32)
    data = np.frombuffer(b"".join(weights for _, weights in rows), np.float32)
    width = width or int(columns.max(initial=-1)) + 1
    return Postings.from_documents(sparse.csr_matrix((data, columns, indptr), shape=(len(rows), width)))


def _create(path: Path, dtype: type, size: int) -> np.ndarray:
    """A file that is mapped for writing; its blocks are reserved, because a full disk would end the process later."""
    array: np.ndarray = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(size,))
    if hasattr(os, "posix_fallocate"):
        with open(path, "rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array
