"""Exact dot products over postings in memory: the reference that engines are held against."""

from dataclasses import dataclass

import numpy as np
from scipy import sparse


def highest(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The positions of the k highest scores above 0, and those scores; ties by position."""
    if k < len(scores):
        bound = np.partition(scores, len(scores) - k)[len(scores) - k]
        candidates = np.flatnonzero((scores >= bound) & (scores > 0))
    else:
        candidates = np.flatnonzero(scores > 0)
    best = candidates[np.argsort(-scores[candidates], kind="stable")][:k]
    return best, scores[best]


@dataclass(frozen=True)
class Postings:
    """Documents by term, as a CSC matrix: exact dot products, one term at a time."""

    indptr: np.ndarray  # (vocabulary + 1,)
    documents: np.ndarray  # (nonzeros,) rising within a term
    weights: np.ndarray  # (nonzeros,) float32
    count: int  # of documents

    @classmethod
    def from_documents(cls, matrix: sparse.csr_matrix) -> "Postings":
        columns = matrix.tocsc()
        columns.sort_indices()
        return cls(columns.indptr.astype(np.int64), columns.indices.astype(np.int32), columns.data, matrix.shape[0])

    def top(self, terms: np.ndarray, weights: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k documents of highest score above 0, and their scores in float64; ties by position.

        Time: one pass over the postings of the query's terms and two over the documents' scores.
        """
        scores = np.zeros(self.count)
        for term, weight in zip(terms, weights, strict=True):
            span = slice(self.indptr[term], self.indptr[term + 1])
            scores[self.documents[span]] += np.multiply(self.weights[span], weight, dtype=np.float64)
        return highest(scores, k)

    def top_rows(self, queries: sparse.csr_matrix, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """``top`` for each row of a matrix of queries."""
        rows = [slice(*queries.indptr[i : i + 2]) for i in range(queries.shape[0])]
        return [self.top(queries.indices[row], queries.data[row], k) for row in rows]
