"""Keep the largest weights of sparse vectors; needs no torch."""

import numpy as np
from scipy import sparse


def prune(matrix: sparse.csr_matrix, k: int) -> sparse.csr_matrix:
    """Keep the k largest weights of each row; among equal ones, those with the lowest term ids."""
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    order = np.lexsort((matrix.indices, -matrix.data, rows))  # by row, the largest weight first
    rank = np.arange(len(rows)) - matrix.indptr[rows]
    keep = np.sort(order[rank < k])
    starts = np.concatenate([[0], np.cumsum(np.minimum(np.diff(matrix.indptr), k))])
    return sparse.csr_matrix((matrix.data[keep], matrix.indices[keep], starts), shape=matrix.shape)
