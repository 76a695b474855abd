"""Texts to sparse rows."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy import sparse
from sentence_transformers import SparseEncoder
from tqdm import tqdm

from anysplade.errors import ModelError

_CHUNK = 1024  # texts sorted by length among themselves; their vectors leave the device together


def encode(
    encoder: SparseEncoder,
    texts: Sequence[str],
    role: Literal["query", "document"],
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> sparse.csr_matrix:
    """Sparse vectors of texts, in their order: float32, (texts, vocabulary).

    Raises:
        ModelError: the model gives a vector with NaN or infinity.
    """
    method = encoder.encode_query if role == "query" else encoder.encode_document
    width = encoder.get_embedding_dimension()
    blocks = []
    with tqdm(total=len(texts), desc=f"encoding {role} texts", unit="text", disable=not progress, leave=False) as bar:
        for start in range(0, len(texts), _CHUNK):
            chunk = list(texts[start : start + _CHUNK])
            rows = method(chunk, batch_size=batch_size, convert_to_tensor=True, save_to_cpu=True, show_progress_bar=False)
            rows = rows.coalesce()
            index, values = rows.indices().numpy(), rows.values().float().numpy()
            if not np.isfinite(values).all():
                bad = start + int(index[0][~np.isfinite(values)][0])
                raise ModelError(f"the model gives NaN or infinity for {role} text {bad + 1}; its training diverged")
            blocks.append(sparse.csr_matrix((values, index), shape=rows.shape, dtype=np.float32))
            bar.update(len(chunk))
    if not blocks:
        return sparse.csr_matrix((0, width or 0), dtype=np.float32)
    matrix = sparse.vstack(blocks, format="csr", dtype=np.float32)
    matrix.eliminate_zeros()
    return matrix
