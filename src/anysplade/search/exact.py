"""Exact dot products in memory, over postings and over dense vectors: the reference for engines."""

from dataclasses import dataclass

import numpy as np
from scipy import sparse

_BLOCK = 2**24  # scores of dense vectors that are computed at a time (64 MiB)

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


def nearest(queries: np.ndarray, documents: np.ndarray, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """``highest`` of the products of each query, (queries, width), with all documents, (documents, width)."""
    size = max(1, _BLOCK // max(1, len(documents)))
    blocks = (queries[start : start + size] @ documents.T for start in range(0, len(queries), size))
    return [highest(row, k, -np.inf) for block in blocks for row in block]
