"""SPLADE pooling fused with the vocabulary projection.

``max (or sum) over tokens of log1p(relu(W h + b))`` is computed in tiles of the vocabulary, without the (batch, length, vocabulary)
logits. Outputs and gradients equal those of the unfused modules up to the order of float additions. Under autocast, the products
run in autocast's type and everything after them in float32. ``_max_pool`` says where Triton kernels compute the maximum.
"""

import functools
import logging
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag, pad

from anysplade.model.hardware import native_int8
from anysplade.model.screening import drop_screen, screened_max
from anysplade.model.tiles import count_terms, fill_padding, index_terms, products, spread_terms

logger = logging.getLogger(__name__)


# Not compiled inside a compiled model: the number of entries in the backward pass depends on the data.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def splade_pool(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    pooling: Literal["max", "sum"] = "max",
    double_log: bool = False,
    live: Tensor | None = None,
) -> Tensor:
    """SPLADE vectors from the hidden states before the decoder.

    Memory: two to three numbers per (sequence, term), the gradients, and 8 MiB of logits at a time (256 MiB on a GPU). With Triton
    kernels there are no logits, and backward takes up to three numbers more per (sequence, term). Without gradients, on a CPU with
    native int8 products, also two int8 copies of the weight.

    Args:
        hidden: (batch, length, width).
        weight: (vocabulary, width).
        bias: (vocabulary,) or None.
        mask: (batch, length), nonzero where there is a token. A row without tokens pools to zeros.
        pooling: over the tokens; arXiv 2107.05720 sums, arXiv 2109.10086 takes the maximum.
        double_log: log1p twice, the activation of arXiv 2504.14839.
        live: ids of the terms that are computed, ascending; the others are 0. None for all.

    Returns:
        (batch, vocabulary), at least 0; float32 under autocast, otherwise of hidden's type. Where tokens tie for the maximum, one
        of them gets the gradient.
    """
    device = hidden.device.type
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    if keep:
        drop_screen(weight)  # the weight is about to change
    elif pooling == "max" and device == "cpu" and torch.float64 not in (hidden.dtype, weight.dtype) and native_int8():
        with torch.autocast(device, enabled=False):
            screened = screened_max(hidden, weight, bias, mask, double_log, live)
        if screened is not None:
            return screened if torch.is_autocast_enabled(device) else screened.to(hidden.dtype)
    return _apply(pooling, hidden, weight, bias, mask, 2 if double_log else 1, keep, live)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def max_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
    """The largest logit of each term over the tokens of a text, without activation. Arguments are those of ``splade_pool``.

    Returns:
        (batch, vocabulary); a row without tokens has the logits of its first padding.
    """
    return _apply("max", hidden, weight, bias, mask, logs=0)


class PoolOptions(NamedTuple):
    """What the autograd functions of pooling take besides tensors with gradients."""

    logs: int  # log1p is applied this many times after relu; 0 leaves the logits as they are
    dtype: torch.dtype  # of the result
    keep: bool  # what the backward pass needs
    live: Tensor | None  # ids of the terms that are computed; None for all


def _apply(
    pooling: Literal["max", "sum"],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    logs: int,
    keep: bool = True,
    live: Tensor | None = None,
) -> Tensor:
    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device):
        half = torch.get_autocast_dtype(device)
        hidden, weight, dtype = hidden.to(half), weight.to(half), torch.float32
    function = _SumPool if pooling == "sum" else _max_pool(hidden, weight, live)
    if function not in (_SumPool, _MaxPool) and hidden.shape[2] % 16:  # kernels copy unaligned rows number by number
        hidden, weight = (pad(t, (0, -t.shape[-1] % 16)) for t in (hidden, weight))
    with torch.autocast(device, enabled=False):
        return function.apply(hidden, weight, bias, mask, PoolOptions(logs, dtype, keep, live))


def _max_pool(hidden: Tensor, weight: Tensor, live: Tensor | None) -> type[torch.autograd.Function]:
    """Triton kernels where they run and tensor cores multiply; exact products of float32 are left to torch's library."""
    if hidden.device.type != "cuda" or not hidden.numel() or not count_terms(weight, live) or not _kernels_run(hidden.device):
        return _MaxPool
    from anysplade.model.kernel_pooling import KernelMaxPool, allows_tf32

    fast = hidden.dtype in (torch.bfloat16, torch.float16) or (hidden.dtype == torch.float32 and allows_tf32())
    return KernelMaxPool if fast else _MaxPool


@functools.cache
def _kernels_run(device: torch.device) -> bool:
    """Whether Triton compiles and runs a kernel on an NVIDIA GPU; if it should and does not, the reason is logged."""
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0) or find_spec("triton") is None:
        return False
    try:
        from anysplade.model.kernel_pooling import check_device

        check_device(device)
    except Exception as error:  # of many kinds: no C compiler, a driver that is too old, a GPU that Triton does not know yet
        logger.warning("pooling runs without Triton kernels, which is slower but gives the same result: %s", error)
        return False
    return True


class _MaxPool(torch.autograd.Function):
    """Pools the largest logits, because the activation is monotone. On a GPU, backward waits once, for the number of entries.

    Only the token with the maximum gets a gradient from a (sequence, term), so both gradients are sparse products with at most
    batch x vocabulary entries.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, options: PoolOptions) -> Tensor:
        logs, dtype, keep, live = options
        batch, length, _ = hidden.shape
        terms = count_terms(weight, live)
        tokens, source = fill_padding(hidden, mask)
        pooled = hidden.new_empty(terms, batch, dtype=dtype)
        chosen = torch.empty(terms if keep else 0, batch, dtype=torch.int32, device=hidden.device)
        for start, end, logits in products(weight, tokens, live):
            logits = logits.view(end - start, batch, length)  # tokens last: fast to reduce
            if keep:
                values, chosen[start:end] = logits.max(dim=2)
            else:
                values = logits.amax(dim=2)
            pooled[start:end] = values
        if bias is not None:
            pooled += bias[index_terms(live, 0, terms)].to(dtype).unsqueeze(1)
        if logs:
            pooled.relu_().masked_fill_(~mask.bool().any(dim=1), 0)
        for _ in range(logs):
            pooled.log1p_()
        result = pooled.T.contiguous()  # (batch, terms)
        if keep:
            ctx.save_for_backward(tokens, weight, bias, source, chosen, result)
            ctx.options = options
        return spread_terms(result, live, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight, bias, source, chosen, result = ctx.saved_tensors
        logs, _, _, live = ctx.options
        batch, length = source.shape
        gradient = gradient if live is None else gradient[:, live]
        if logs:
            gradient = gradient * _slope(result, logs) * (result > 0)
        through = gradient.T  # (terms, batch)
        term, row = through.nonzero(as_tuple=True)  # sorted by term
        token = source[row, chosen[term, row].long()] + row * length
        values = through[term, row].to(tokens.dtype)
        term = term if live is None else live[term]
        to_hidden = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            order = token.argsort(stable=True)
            to_hidden = _sparse_product(token[order], term[order], values[order], weight.to(tokens.dtype), len(tokens))
            to_hidden = to_hidden.view(batch, length, -1)
        if ctx.needs_input_grad[1]:
            to_weight = _sparse_product(term, token, values, tokens, len(weight)).to(weight.dtype)
        if bias is not None and ctx.needs_input_grad[2]:
            to_bias = spread_terms(through.sum(dim=1), live, len(weight)).to(bias.dtype)
        return to_hidden, to_weight, to_bias, None, None


class _SumPool(torch.autograd.Function):
    """Pools all tokens; the backward pass computes the logits of each tile again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, options: PoolOptions) -> Tensor:
        logs, dtype, _, live = options
        batch, length, width = hidden.shape
        tokens = hidden.reshape(-1, width)
        pooled = hidden.new_empty(count_terms(weight, live), batch, dtype=dtype)
        for start, end, logits in products(weight, tokens, live):
            activation = _activation(logits, None if bias is None else bias[index_terms(live, start, end)], dtype, logs)
            pooled[start:end] = activation.view(-1, batch, length).mul_(mask.to(dtype)).sum(dim=2)
        ctx.save_for_backward(tokens, weight, bias, mask)
        ctx.options = options
        return spread_terms(pooled.T.contiguous(), live, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight, bias, mask = ctx.saved_tensors
        logs, dtype, _, live = ctx.options
        batch, length = mask.shape
        gradient = gradient if live is None else gradient[:, live]
        to_hidden = tokens.new_zeros(tokens.shape, dtype=dtype)
        to_weight = torch.zeros_like(weight)
        to_bias = None if bias is None else torch.zeros_like(bias)
        for start, end, logits in products(weight, tokens, live):
            terms = index_terms(live, start, end)
            activation = _activation(logits, None if bias is None else bias[terms], dtype, logs)
            through = (_slope(activation, logs) * (activation > 0)).view(-1, batch, length)
            through = (through * gradient.T[start:end].unsqueeze(2) * mask.to(dtype)).view(end - start, -1)
            if to_bias is not None:
                to_bias[terms] = through.sum(dim=1).to(to_bias.dtype)
            through = through.to(tokens.dtype)
            to_hidden += through.T @ weight[terms].to(tokens.dtype)
            to_weight[terms] = (through @ tokens).to(to_weight.dtype)
        return to_hidden.to(tokens.dtype).view(batch, length, -1), to_weight, to_bias, None, None


def _activation(logits: Tensor, bias: Tensor | None, dtype: torch.dtype, logs: int) -> Tensor:
    activation = logits.to(dtype)
    if bias is not None:
        activation += bias.to(dtype).unsqueeze(1)
    activation.relu_()
    for _ in range(logs):
        activation.log1p_()
    return activation


def _slope(result: Tensor, logs: int) -> Tensor:
    """Derivative of the activation, given its result: with y = log1p(x), dy/dx = 1 / (1 + x) = exp(-y)."""
    slope = torch.exp(-result)
    return slope * torch.exp(-torch.expm1(result)) if logs == 2 else slope


def _sparse_product(rows: Tensor, columns: Tensor, values: Tensor, dense: Tensor, count: int) -> Tensor:
    """Product of a sparse matrix with ``count`` rows, its entries sorted by row, and a dense one: (count, width).

    Each row is summed in a fixed order, so the result is the same every time, on a GPU too. Half-precision products are summed in
    float32.
    """
    starts = torch.searchsorted(rows, torch.arange(count + 1, device=rows.device))
    return embedding_bag(columns, dense, starts, mode="sum", per_sample_weights=values, include_last_offset=True)
