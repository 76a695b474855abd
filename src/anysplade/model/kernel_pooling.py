"""Max pooling by the Triton kernels of ``kernels``: no logits in memory, and no wait for the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from anysplade.model.kernels import count_entries, largest_logits, list_by_term, list_by_token, sum_entries
from anysplade.model.tiles import count_terms, spread_terms

if TYPE_CHECKING:
    from anysplade.model.pooling import PoolOptions

BLOCK = 64  # tokens, and terms, that share a list of entries
SEGMENT = 2048  # terms of a text that one program lists
GROUP_BYTES = 16 * 2**20  # hidden states that stay in the cache while tiles of terms pass


class Tile(NamedTuple):
    """One program's part of a product. It is fixed, not tuned at run time: another tile adds in another order."""

    tokens: int  # or entries, of the gradients
    terms: int  # ``BLOCK`` of the gradients
    width: int
    warps: int
    stages: int


def tile(hidden: Tensor) -> Tile:
    """The tile for a device and a type: what fits in its shared memory and registers."""
    bytes_per_number = hidden.element_size()
    large = hidden.is_cuda and torch.cuda.get_device_capability(hidden.device)[0] in (9, 10)  # 228 KiB of shared memory
    exact = hidden.dtype == torch.float32 and not allows_tf32()
    return Tile(tokens=128, terms=256 if large and not exact else 128, width=128 // bytes_per_number, warps=8, stages=3)


def gradient_tile(dense: Tensor) -> Tile:
    """The tile of ``sum_entries``."""
    width = max(16, 1 << (dense.shape[-1] - 1).bit_length())
    return Tile(tokens=128 // dense.element_size(), terms=BLOCK, width=min(128, width), warps=4, stages=5)


def allows_tf32() -> bool:
    """Whether torch may multiply float32 matrices in TF32 on a GPU."""
    matmul: Any = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)  # torch 2.8 lacks it
    return bool(matmul.allow_tf32) if precision is None else precision == "tf32"


def check_device(device: torch.device) -> None:
    """Run a kernel on a small example; raises whatever Triton raises if it cannot compile or run it."""
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
        raise RuntimeError(f"Triton {triton.__version__} is installed, and 3.6 or later is needed, which comes with torch 2.11")
    hidden = torch.ones(1, 16, 64, dtype=torch.bfloat16, device=device)
    pooled = hidden.new_empty(1, 16)
    with torch.cuda.device(device):
        pool(hidden, hidden[0], None, torch.ones(1, 16, device=device), None, pooled, None, 0)
    if not bool((pooled == 64).all()):
        raise RuntimeError(f"a product of ones is {pooled[0, 0].item()}, and not 64")


class KernelMaxPool(torch.autograd.Function):
    """The ``_MaxPool`` of ``pooling`` by Triton kernels. Gradients are the same on every run.

    Logits are float32 until they are activated. Of tokens that tie for the maximum, the first gets the gradient.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, options: PoolOptions) -> Tensor:
        logs, dtype, keep, live = options
        hidden, decoder = hidden.contiguous(), weight.to(hidden.dtype).contiguous()
        shape = len(hidden), count_terms(weight, live)
        pooled = hidden.new_empty(shape, dtype=dtype)
        chosen = hidden.new_empty(shape, dtype=torch.int32) if keep else None
        with torch.cuda.device_of(hidden):
            pool(hidden, decoder, bias, mask, live, pooled, chosen, logs)
        if keep:
            ctx.save_for_backward(hidden, decoder, chosen, pooled)
            ctx.options = options
            ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return spread_terms(pooled, live, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, decoder, chosen, pooled = ctx.saved_tensors
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        to_hidden = to_weight = to_bias = None
        with torch.cuda.device_of(hidden):
            entries = _Entries(gradient, pooled, chosen, ctx.options.live, ctx.options.logs)
            if of_hidden:
                to_hidden = entries.to_hidden(hidden, decoder)
            if of_weight or of_bias:
                to_weight, to_bias = entries.to_decoder(hidden, decoder, *ctx.dtypes)
        return to_hidden, to_weight if of_weight else None, to_bias if of_bias else None, None, None


def pool(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    live: Tensor | None,
    pooled: Tensor,
    chosen: Tensor | None,
    logs: int,
) -> None:
    """Write ``pooled``, (batch, terms), and the token of each maximum."""
    texts, length, width = hidden.shape
    of = tile(hidden)
    sizes = (16,) if length <= 16 else (128, 64, 32)
    block = min(of.tokens, min(sizes, key=lambda size: -(-length // size) * size))  # the largest of those with the least padding
    per_tile = of.tokens // block
    source = _sources(mask, block)
    text_tiles, term_tiles = -(-texts // per_tile), -(-pooled.shape[1] // of.terms)
    largest_logits[(text_tiles * term_tiles,)](
        hidden,
        weight,
        bias,
        source,
        live,
        pooled,
        chosen,
        texts,
        length,
        source.shape[1],
        pooled.shape[1],
        width,
        max(1, min(text_tiles, GROUP_BYTES // (per_tile * length * width * hidden.element_size()))),
        LOGS=logs,
        PRECISION=_precision(hidden),
        TEXTS=per_tile,
        BLOCK_TOKENS=block,
        BLOCK_TERMS=of.terms,
        BLOCK_WIDTH=of.width,
        EVEN_WIDTH=width % of.width == 0,
        num_warps=of.warps,
        num_stages=of.stages,
    )


def _sources(mask: Tensor, block: int) -> Tensor:
    """The token that stands at each position, (batch, length in whole blocks): at padding, the first one; -1 without tokens."""
    length = mask.shape[1]
    mask = torch.nn.functional.pad(mask.bool(), (0, -length % block))
    position = torch.arange(mask.shape[1], dtype=torch.int32, device=mask.device)
    first = torch.where(mask, position, mask.shape[1]).amin(dim=1, keepdim=True)
    return torch.where(mask, position, torch.where(first < length, first, -1)).int()


def _precision(hidden: Tensor) -> str:
    return "tf32" if hidden.dtype != torch.float32 or allows_tf32() else "ieee"


class _Entries:
    """The nonzero gradients of the largest logits, at most one per (text, term)."""

    def __init__(self, gradient: Tensor, pooled: Tensor, chosen: Tensor, live: Tensor | None, logs: int) -> None:
        self.sources = (gradient, pooled, chosen, live)
        self.steps = gradient.stride()
        self.live, self.logs = live, logs
        self.texts, self.terms = pooled.shape

    def to_hidden(self, hidden: Tensor, decoder: Tensor) -> Tensor:
        """The gradient of the hidden states."""
        length = hidden.shape[1]
        blocks, segments = -(-length // BLOCK), -(-self.terms // SEGMENT)
        counts = hidden.new_empty(self.texts * blocks, segments, dtype=torch.int32)
        settings = {"LOGS": self.logs, "SEGMENT": SEGMENT, "BLOCK": BLOCK, "num_warps": 8}
        count_entries[(self.texts, segments)](*self.sources, counts, self.terms, blocks, *self.steps, **settings)
        ends = counts.view(-1).cumsum(0).view_as(counts)
        starts = ends - counts
        lists = self._lists(hidden, self.texts * self.terms)
        list_by_token[(self.texts, segments)](*self.sources, starts, *lists, self.terms, blocks, *self.steps, **settings)
        out = torch.empty_like(hidden)
        _sum(out, decoder, lists, starts[:, 0].contiguous(), ends[:, -1].contiguous(), None, length)
        return out

    def to_decoder(
        self, hidden: Tensor, decoder: Tensor, weight_type: torch.dtype, bias_type: torch.dtype | None
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients of the decoder's weight and bias."""
        blocks = -(-self.terms // BLOCK)
        lists = self._lists(hidden, blocks * BLOCK * self.texts)
        starts = torch.arange(blocks, device=hidden.device) * (BLOCK * self.texts)
        ends = torch.empty_like(starts)
        make = torch.empty if self.live is None else torch.zeros
        to_weight = make(decoder.shape, dtype=weight_type, device=hidden.device)
        to_bias = None if bias_type is None else make(len(decoder), dtype=bias_type, device=hidden.device)
        list_by_term[(blocks,)](
            *self.sources,
            *lists,
            ends,
            to_bias,
            self.texts,
            hidden.shape[1],
            self.terms,
            *self.steps,
            LOGS=self.logs,
            TEXTS=16,
            BLOCK=BLOCK,
        )
        _sum(to_weight, hidden, lists, starts, ends, self.live, self.terms)
        return to_weight, to_bias

    def _lists(self, hidden: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
        """Memory for rows, slots and values if every (text, term) is an entry. GPUs copy 4 bytes at a time in the background."""
        rows, slots = hidden.new_empty(2, capacity, dtype=torch.int32)
        return rows, slots, hidden.new_empty(capacity, dtype=torch.float32)


def _sum(
    out: Tensor, dense: Tensor, lists: tuple[Tensor, ...], starts: Tensor, ends: Tensor, live: Tensor | None, height: int
) -> None:
    width = out.shape[-1]
    of = gradient_tile(dense)
    grid = len(starts), -(-width // of.width)
    sum_entries[grid](
        out,
        dense,
        *lists,
        starts,
        ends,
        live,
        height,
        width,
        PRECISION=_precision(dense),
        BLOCK=BLOCK,
        BLOCK_WIDTH=of.width,
        BLOCK_ENTRIES=of.tokens,
        num_warps=of.warps,
        num_stages=of.stages,
    )
