"""The product of hidden states and decoder, computed for a few terms of the vocabulary at a time.

``live`` holds the ids of the terms that are computed, ascending; None means all terms.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Bytes of logits per tile. A CPU reduces a tile while it is in its cache; a GPU needs few launches.
_TILE_BYTES = {"cpu": 8 * 2**20}
_DEVICE_TILE_BYTES = 256 * 2**20


def products(weight: Tensor, tokens: Tensor, live: Tensor | None) -> Iterator[tuple[int, int, Tensor]]:
    """``weight @ tokens.T`` tile by tile: (start, end, logits).

    All tiles share one buffer: fresh memory for every tile would take as long as the product itself.
    """
    columns = tokens.T
    buffer: Tensor | None = None
    for start, end in tiles(count_terms(weight, live), columns.element_size() * columns.shape[1], columns.device):
        if buffer is None:
            buffer = columns.new_empty(end, columns.shape[1])
        yield start, end, torch.mm(weight[index_terms(live, start, end)].to(columns.dtype), columns, out=buffer[: end - start])


def tiles(terms: int, bytes_per_term: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Split the terms into tiles: (start, end)."""
    height = max(64, _TILE_BYTES.get(device.type, _DEVICE_TILE_BYTES) // max(1, bytes_per_term))
    for start in range(0, terms, height):
        yield start, min(terms, start + height)


def count_terms(weight: Tensor, live: Tensor | None) -> int:
    """Number of terms that are computed."""
    return len(weight) if live is None else len(live)


def index_terms(live: Tensor | None, start: int, end: int) -> Any:
    """Index of the computed terms from ``start`` to ``end`` among all terms."""
    return slice(start, end) if live is None else live[start:end]


def spread_terms(values: Tensor, live: Tensor | None, count: int) -> Tensor:
    """Values of the computed terms, (..., terms), among all terms, (..., count); zeros elsewhere."""
    if live is None:
        return values
    return values.new_zeros(*values.shape[:-1], count).index_copy_(-1, live, values)


def fill_padding(hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Replace padding by the first token of its row, which leaves every maximum unchanged and saves masking the logits.

    Returns:
        The tokens, (batch x length, width), and the position from which each was taken, (batch, length).
    """
    batch, length, width = hidden.shape
    mask = mask.bool()
    position = torch.arange(length, device=hidden.device).expand(batch, length)
    source = torch.where(mask, position, mask.int().argmax(dim=1, keepdim=True))
    return hidden.gather(1, source.unsqueeze(-1).expand(-1, -1, width)).reshape(-1, width), source
