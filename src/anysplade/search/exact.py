"""Exact dot products, over postings, over blocks of sparse vectors and over dense vectors: the reference for engines."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import sparse

_BLOCK = 2**24  # scores of dense vectors that are computed at a time (64 MiB)
_DOCUMENTS = 2**15  # in a block of sparse vectors: a query's scores take 256 KiB and stay in a core's cache
_NONZEROS = 2**23  # in a block of sparse vectors: its postings take 96 MiB
_QUERIES = 32  # that a thread takes at a time

_SPAN = 256  # scores


def highest(scores: np.ndarray, k: int, above: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """The positions of the k highest scores above a bound, and these scores; ties by position."""
    bound = _bound(scores, k) if k < len(scores) else above
    candidates = np.flatnonzero(scores >= bound if bound > above else scores > above)
    best = candidates[np.argsort(-scores[candidates], kind="stable")][:k]
    return best, scores[best]


def _bound(scores: np.ndarray, k: int) -> float:
    """A number that is at most the k-th highest score; of many scores, the k-th highest maximum of spans, which is found faster."""
    spans = len(scores) // _SPAN
    if spans > 4 * k:
        scores = scores[: spans * _SPAN].reshape(spans, _SPAN).max(axis=1)
    return float(np.partition(scores, len(scores) - k)[len(scores) - k])


@dataclass(frozen=True)
class Postings:
    """Documents by term: a CSC matrix."""

    indptr: np.ndarray  # (terms + 1,)
    documents: np.ndarray  # (nonzeros,) rising within a term
    weights: np.ndarray  # (nonzeros,) float32
    count: int  # of documents

    @classmethod
    def from_documents(cls, matrix: sparse.csr_matrix) -> "Postings":
        columns = matrix.tocsc()
        columns.sort_indices()
        return cls(columns.indptr.astype(np.int64), columns.indices.astype(np.int32), columns.data, matrix.shape[0])

    def top(self, terms: np.ndarray, weights: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k documents with the highest scores above 0, and their scores in float64; ties by position.

        Time: one pass over the postings of the query's terms, and two over the scores of all documents.
        """
        return highest(self.scores(terms, weights), k)

    def scores(self, terms: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The scores of all documents, (documents,) float64; a term without postings adds nothing."""
        scores = np.zeros(self.count)
        for term, weight in zip(terms, weights, strict=True):
            if term < len(self.indptr) - 1:
                span = slice(self.indptr[term], self.indptr[term + 1])
                scores[self.documents[span]] += np.multiply(self.weights[span], weight, dtype=np.float64)
        return scores

    def top_rows(self, queries: sparse.csr_matrix, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """``top`` for each row of a matrix of queries."""
        return [self.top(row.indices, row.data, k) for row in queries]


class _Ranking:
    """The k documents with the highest scores above 0 in the blocks of documents that a query has seen; ties by position."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.bound = 0.0  # what a later document must exceed
        self.found: list[tuple[np.ndarray, np.ndarray]] = []  # positions and scores
        self.count = 0  # of documents found

    def add(self, start: int, scores: np.ndarray) -> None:
        """Add the documents from position ``start`` on."""
        places = np.flatnonzero(scores > self.bound)
        self.found.append((places + start, scores[places]))
        self.count += len(places)
        if self.count >= 2 * self.k:  # seldom after the first blocks, so that sorting costs little
            self.best()

    def best(self) -> tuple[np.ndarray, np.ndarray]:
        """The positions and their scores, the highest first."""
        places, scores = (np.concatenate(parts) for parts in zip(*self.found, strict=True))
        order, scores = highest(scores, self.k)  # earlier documents come first, so ties are by position
        self.found, self.count = [(places[order], scores)], len(scores)
        if len(scores) == self.k:
            self.bound = float(scores[-1])
        return self.found[0]


def top_rows(
    documents: sparse.csr_matrix,
    queries: sparse.csr_matrix,
    k: int,
    *,
    dtype: type[np.floating] = np.float64,
    workers: int | None = None,
    groups: np.ndarray | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each query the positions of the k documents with the highest scores above 0, and the scores; ties by position.

    The documents, which may be mapped from a file, are read once, in blocks. Threads share the queries, whose scores are those of
    ``Postings.top`` to the last bit: products are added in the order of the query's terms. In memory are two blocks of postings,
    up to 96 MiB each in float64, and up to ``2 * k`` documents per query. Time: one pass over the postings of each query's terms,
    and one over the scores of all documents.

    Args:
        documents: (documents, vocabulary).
        queries: (queries, vocabulary); a term may occur twice.
        dtype: of the products and scores.
        workers: number of threads; by default the number of cores.
        groups: the first row of each document and the number of rows, (documents + 1,), if a document has several rows, at least
            one: its score is the highest of theirs. By default each row is a document.
    """
    rankings = [_Ranking(k) for _ in range(queries.shape[0])]
    spans = [slice(*queries.indptr[i : i + 2]) for i in range(queries.shape[0])]
    jobs = [
        (queries.indices[span], queries.data[span].astype(dtype), ranking) for span, ranking in zip(spans, rankings, strict=True)
    ]
    parts = [jobs[i : i + _QUERIES] for i in range(0, len(jobs), _QUERIES)]
    with ThreadPoolExecutor(workers or count_cores(), thread_name_prefix="searching") as pool:
        blocks = list(_blocks(documents.indptr if groups is None else documents.indptr[groups]))
        rows = blocks if groups is None else [(int(groups[start]), int(groups[end])) for start, end in blocks]
        waiting = [pool.submit(_columns, documents, dtype, *block) for block in rows[:1]]
        for number, (start, end) in enumerate(blocks):
            columns = waiting.pop().result()
            waiting = [pool.submit(_columns, documents, dtype, *block) for block in rows[number + 1 : number + 2]]
            first = None if groups is None else groups[start:end] - groups[start]
            for _ in pool.map(partial(_rank, columns, start, first), parts):
                pass
    return [ranking.best() if ranking.found else _NOTHING for ranking in rankings]


_NOTHING = np.zeros(0, np.int64), np.zeros(0)


def count_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _blocks(indptr: np.ndarray) -> Iterator[tuple[int, int]]:
    """The first and last rows of blocks of a CSR matrix."""
    start = 0
    while start < len(indptr) - 1:
        end = int(np.searchsorted(indptr, indptr[start] + _NONZEROS, "right")) - 1
        end = min(max(end, start + 1), start + _DOCUMENTS, len(indptr) - 1)
        yield start, end
        start = end


def _columns(documents: sparse.csr_matrix, dtype: type[np.floating], start: int, end: int) -> sparse.csc_matrix:
    """The postings of some rows."""
    bounds = documents.indptr[start : end + 1]
    span = slice(bounds[0], bounds[-1])
    parts = documents.data[span].astype(dtype), documents.indices[span], (bounds - bounds[0]).astype(np.int32)
    return sparse.csr_matrix(parts, shape=(end - start, documents.shape[1])).tocsc()


def _rank(
    columns: sparse.csc_matrix, start: int, first: np.ndarray | None, jobs: list[tuple[np.ndarray, np.ndarray, _Ranking]]
) -> None:
    """Add the documents from position ``start`` on to rankings; ``first`` has the first row of each, if one can have several."""
    for terms, weights, ranking in jobs:
        if len(terms):
            scores = columns[:, terms] @ weights  # SciPy releases the lock of Python while it copies and adds
            ranking.add(start, scores if first is None else np.maximum.reduceat(scores, first))


def nearest(
    queries: np.ndarray, documents: np.ndarray, k: int, groups: np.ndarray | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """``highest`` of the products of each query, (queries, width), with all documents, (documents, width).

    ``groups`` is as in ``top_rows``.
    """
    size = max(1, _BLOCK // max(1, len(documents)))
    blocks = (queries[start : start + size] @ documents.T for start in range(0, len(queries), size))
    if groups is not None:
        blocks = (np.maximum.reduceat(block, groups[:-1], axis=1) for block in blocks)
    return [highest(row, k, -np.inf) for block in blocks for row in block]
