"""Cost of searching, computed from the vectors of queries and documents."""

from typing import Any

import numpy as np
from scipy import sparse

_BLOCK = 2**22  # nonzeros that are counted at a time (32 MiB)
COSTS = ("query_active_dims", "document_active_dims", "flops")  # what tables show of a cost
OWN_WORDS = ("query_own_words", "document_own_words")  # beside the costs: what the vectors keep of the texts' own words


def search_cost(queries: sparse.csr_matrix, documents: sparse.csr_matrix, count: int | None = None) -> dict[str, Any]:
    """Cost of searching with sparse vectors, (queries, vocabulary) and (documents, vocabulary), at least one row each.

    If the rows of ``documents`` are passages of a ``count`` of documents, active dims are those of a passage, and FLOPS are summed
    over the passages of a document.
    """
    found = counted_cost(queries, _frequency(documents), np.diff(documents.indptr))
    if count is None:
        return found
    passages = passage_cost(found["flops"], documents.shape[0], count)
    return found | {"flops": found["flops"] * documents.shape[0] / count} | passages


def counted_cost(queries: sparse.csr_matrix, document_frequency: np.ndarray, document_active: np.ndarray) -> dict[str, Any]:
    """``search_cost`` by counts.

    Args:
        queries: (queries, vocabulary).
        document_frequency: documents that have each term, (vocabulary,).
        document_active: terms of each document, (documents,).
    """

    def spread(active: np.ndarray) -> dict[str, float]:
        """The terms per vector."""
        return {"mean": float(active.mean()), "median": float(np.median(active)), "p95": float(np.quantile(active, 0.95))}

    products = float(_frequency(queries) @ document_frequency)
    return {
        "query_active_dims": spread(np.diff(queries.indptr)),
        "document_active_dims": spread(document_active),
        "flops": products / (queries.shape[0] * len(document_active)),  # expected, per pair (Paria et al., arXiv 2004.05665)
        "vocabulary_used": int((document_frequency > 0).sum()),  # terms that occur in a document
        "postings_per_query": products / queries.shape[0],  # mean number of (document, weight) pairs that a query reads
        "index_bytes": 8 * (int(document_frequency.sum()) + len(document_frequency) + 1),  # of the postings, without texts and ids
    }


def passage_cost(flops: float, passages: int, documents: int) -> dict[str, Any]:
    """What the cost of passages has besides; ``flops`` are those of a passage."""
    return {"passages": passages, "passages_per_document": passages / documents, "flops_per_passage": flops}


def _frequency(matrix: sparse.csr_matrix) -> np.ndarray:
    """Number of rows that have each term, (vocabulary,); in blocks, as NumPy converts what it counts to int64."""
    counts = np.zeros(matrix.shape[1], np.int64)
    for start in range(0, matrix.nnz, _BLOCK):
        counts += np.bincount(matrix.indices[start : start + _BLOCK], minlength=matrix.shape[1])
    return counts


def dense_cost(vectors: int, width: int, count: int | None = None) -> dict[str, Any]:
    """Cost of exact search with dense vectors, in the terms of ``search_cost``: every vector uses all dimensions."""
    active_dims = dict.fromkeys(("mean", "median", "p95"), float(width))
    return {
        "query_active_dims": active_dims,
        "document_active_dims": active_dims,
        "flops": float(width) * vectors / (count or vectors),
        "dimensions": width,
        "index_bytes": 4 * vectors * width,
        **({} if count is None else passage_cost(float(width), vectors, count)),
    }


def mean_costs(cost: dict[str, Any] | None) -> dict[str, Any]:
    """The values of ``COSTS``, means over the vectors; all None without a cost."""
    values = [cost and cost[name] for name in COSTS]
    return {name: value["mean"] if isinstance(value, dict) else value for name, value in zip(COSTS, values, strict=True)}
