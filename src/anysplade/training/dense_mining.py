"""The nearest documents by dense vectors, exact, in blocks of documents: on a GPU if there is one."""

from itertools import pairwise

import numpy as np
import torch

from anysplade.search.exact import nearest

_DOCUMENTS = 2**17  # per block

Found = tuple[np.ndarray, np.ndarray]  # positions of documents and their scores, the best first


def nearest_in_blocks(queries: np.ndarray, vectors: np.ndarray, k: int, device: str, size: int = _DOCUMENTS) -> list[Found]:
    """The k documents with the highest products for each query, and these; ties by position.

    Args:
        queries: (queries, width).
        vectors: of the documents, (documents, width), float16, may be memory-mapped.
        device: where the products are computed, in float32.
        size: documents whose vectors are in memory at once.
    """
    best: list[Found] = []
    queries = queries.astype(np.float32)
    for start in range(0, len(vectors), size):
        block = vectors[start : start + size]
        found = nearest(queries, block.astype(np.float32), k) if device == "cpu" else _nearest_on(device, queries, block, k)
        found = [(positions + start, scores) for positions, scores in found]
        best = [_best(one, other, k) for one, other in zip(best, found, strict=True)] if best else found
    return best


def _best(one: Found, other: Found, k: int) -> Found:
    positions, scores = (np.concatenate(both) for both in zip(one, other, strict=True))
    order = np.argsort(-scores, kind="stable")[:k]
    return positions[order], scores[order]


@torch.no_grad()
def _nearest_on(device: str, queries: np.ndarray, block: np.ndarray, k: int) -> list[Found]:
    """``nearest`` on a device: all scores from the k-th highest on are sorted here, so that ties are by position."""
    scores = torch.from_numpy(queries).to(device) @ torch.from_numpy(np.ascontiguousarray(block)).to(device).float().T
    bound = scores.topk(min(k, len(block)), dim=1).values[:, -1:]
    rows, positions = (scores >= bound).nonzero(as_tuple=True)
    values = scores[rows, positions].cpu().numpy()
    limits = np.searchsorted(rows.cpu().numpy(), np.arange(len(queries) + 1))
    places = positions.cpu().numpy()
    found = []
    for start, end in pairwise(limits.tolist()):
        order = np.argsort(-values[start:end], kind="stable")[:k]
        found.append((places[start:end][order], values[start:end][order]))
    return found
