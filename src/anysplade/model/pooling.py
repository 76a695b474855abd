"""SPLADE pooling fused with the vocabulary projection.

``max (or sum) over tokens of log1p(relu(W h + b))`` without the (batch, length, vocabulary) logits:
the projection runs in tiles of the vocabulary, and of each tile only what pooling needs is kept.

For max pooling that is the maximum over the tokens, since the activation is monotone. Backward, each
(sequence, term) touches the one token that held its maximum, so both gradients are sparse products
with at most batch x vocabulary entries instead of dense ones with batch x length x vocabulary.
Sum pooling touches every token; it computes each tile's logits a second time in backward.

Exact: outputs and gradients are those of the unfused modules up to the order of float additions.
Under autocast the products run in autocast's type and all that follows in float32.

Encoding in float32 on a CPU with bfloat16 products is exact and faster still: the product runs in
bfloat16 first, and only entries that its error bound leaves a chance to be above zero are computed
in float32. A trained model has a few hundred of them in a text.
"""

import functools
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

_TILE_BYTES = 8 * 2**20  # of logits at a time: they are reduced while they lie in the cache
_SCREENED_SHARE = 0.05  # of the entries: where more may be above zero, screening costs more than it saves
_BFLOAT16 = 2.0**-8  # unit roundoff: half of torch.finfo(torch.bfloat16).eps, which is the distance of 1 from the next number
_FLOAT32 = 2.0**-24


# Inside a compiled model it runs as it is: how many entries backward has depends on the data.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def splade_pool(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    pooling: Literal["max", "sum"] = "max",
    double_log: bool = False,
) -> Tensor:
    """SPLADE vectors from the hidden states before the decoder.

    Args:
        hidden: (batch, length, width).
        weight: (vocabulary, width).
        bias: (vocabulary,) or None.
        mask: (batch, length), nonzero where there is a token. A row without tokens pools to zeros.
        pooling: over the tokens; arXiv 2107.05720 sums, arXiv 2109.10086 takes the maximum.
        double_log: log1p twice, the activation of arXiv 2504.14839.

    Returns:
        (batch, vocabulary), at least 0; float32 under autocast, else of hidden's type. Where tokens
        tie for the maximum, one of them gets the gradient.

    Memory: two to three numbers a (sequence, term), 8 MiB of logits at a time, and the gradients.
    """
    device = hidden.device.type
    dtype = hidden.dtype
    if torch.is_autocast_enabled(device):
        half = torch.get_autocast_dtype(device)
        hidden, weight, dtype = hidden.to(half), weight.to(half), torch.float32
    inputs = (hidden, weight, bias)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    with torch.autocast(device, enabled=False):
        if pooling == "sum":
            return _SumPool.apply(*inputs, mask, double_log, dtype)
        if not keep and hidden.dtype == weight.dtype == torch.float32 and device == "cpu" and native_bfloat16(device):
            screened = _screened_max(*inputs, mask, double_log)
            if screened is not None:
                return screened
        return _MaxPool.apply(*inputs, mask, double_log, dtype, keep)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor,
        double_log: bool,
        dtype: torch.dtype,
        keep: bool,
    ) -> Tensor:
        batch, length, _ = hidden.shape
        vocabulary = weight.shape[0]
        tokens, source = _fill_padding(hidden, mask)
        pooled = hidden.new_empty(vocabulary, batch, dtype=dtype)
        chosen = torch.empty(vocabulary if keep else 0, batch, dtype=torch.int32, device=hidden.device)
        for start, end, logits in _tiles(weight, tokens):
            logits = logits.view(end - start, batch, length)  # tokens last: fast to reduce
            if keep:
                values, chosen[start:end] = logits.max(dim=2)
            else:
                values = logits.amax(dim=2)
            pooled[start:end] = values
        if bias is not None:
            pooled += bias.to(dtype).unsqueeze(1)
        pooled.relu_().masked_fill_(~mask.bool().any(dim=1), 0).log1p_()
        if double_log:
            pooled.log1p_()
        result = pooled.T.contiguous()  # (batch, vocabulary)
        if keep:
            ctx.save_for_backward(tokens, weight, bias, source, chosen, result)
            ctx.double_log = double_log
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight, bias, source, chosen, result = ctx.saved_tensors
        batch, length = source.shape
        through = (gradient * _slope(result, ctx.double_log) * (result > 0)).T  # (vocabulary, batch)
        term, row = through.nonzero(as_tuple=True)  # sorted by term
        token = source[row, chosen[term, row].long()] + row * length
        values = through[term, row].to(tokens.dtype)
        to_hidden = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            order = token.argsort(stable=True)
            to_hidden = _sums(token[order], term[order], values[order], weight.to(tokens.dtype), len(tokens))
            to_hidden = to_hidden.view(batch, length, -1)
        if ctx.needs_input_grad[1]:
            to_weight = _sums(term, token, values, tokens, len(weight)).to(weight.dtype)
        if bias is not None and ctx.needs_input_grad[2]:
            to_bias = through.sum(dim=1).to(bias.dtype)
        return to_hidden, to_weight, to_bias, None, None, None, None


class _SumPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, double_log: bool, dtype: torch.dtype
    ) -> Tensor:
        batch, length, width = hidden.shape
        tokens = hidden.reshape(-1, width)
        pooled = hidden.new_empty(len(weight), batch, dtype=dtype)
        for start, end, logits in _tiles(weight, tokens):
            activation = _activation(logits, bias, start, end, dtype, double_log)
            pooled[start:end] = activation.view(-1, batch, length).mul_(mask.to(dtype)).sum(dim=2)
        ctx.save_for_backward(tokens, weight, bias, mask)
        ctx.double_log, ctx.dtype = double_log, dtype
        return pooled.T.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight, bias, mask = ctx.saved_tensors
        batch, length = mask.shape
        to_hidden = tokens.new_zeros(tokens.shape, dtype=ctx.dtype)
        to_weight = torch.empty_like(weight)
        to_bias = None if bias is None else torch.empty_like(bias)
        for start, end, logits in _tiles(weight, tokens):
            activation = _activation(logits, bias, start, end, ctx.dtype, ctx.double_log)
            through = (_slope(activation, ctx.double_log) * (activation > 0)).view(-1, batch, length)
            through = (through * gradient.T[start:end].unsqueeze(2) * mask.to(ctx.dtype)).view(end - start, -1)
            if to_bias is not None:
                to_bias[start:end] = through.sum(dim=1)
            through = through.to(tokens.dtype)
            to_hidden += through.T @ weight[start:end].to(tokens.dtype)
            to_weight[start:end] = through @ tokens
        return to_hidden.to(tokens.dtype).view(batch, length, -1), to_weight, to_bias, None, None, None


@torch.no_grad()
def _screened_max(hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, double_log: bool) -> Tensor | None:
    """Max pooling in float32 by way of bfloat16; None if too many entries may be above zero.

    An entry is computed in float32 unless its bfloat16 value lies below zero by more than the error can be; see
    ``_screening_errors``.
    """
    batch, length, width = hidden.shape
    of_factors, of_result = _screening_errors(width)
    tokens, _ = _fill_padding(hidden, mask)
    longest = tokens.norm(dim=1).view(batch, length).amax(dim=1)  # (batch,)
    rows, terms = [], []
    most = int(_SCREENED_SHARE * batch * len(weight))
    for start, end, logits in _tiles(weight, tokens.bfloat16()):
        rough = logits.view(end - start, batch, length).amax(dim=2).float()
        error = of_factors * weight[start:end].norm(dim=1, keepdim=True) * longest + of_result * rough.abs()
        if bias is not None:
            rough += bias[start:end].unsqueeze(1)
            error += 2 * _FLOAT32 * bias[start:end].abs().unsqueeze(1)  # the sum is rounded, here and in float32
        term, row = (~(rough + error <= 0)).nonzero(as_tuple=True)  # NaN too, which must be seen
        most -= len(term)
        if most < 0:
            return None
        rows.append(row)
        terms.append(term + start)
    row, term = torch.cat(rows), torch.cat(terms)
    result = hidden.new_zeros(batch, len(weight))
    texts = tokens.view(batch, length, -1)
    for i in mask.bool().any(dim=1).nonzero()[:, 0].tolist():
        chosen = term[row == i]
        values = (weight[chosen] @ texts[i].T).amax(dim=1)
        if bias is not None:
            values += bias[chosen]
        result[i, chosen] = values.relu_().log1p_()
    return result.log1p_() if double_log else result


def _screening_errors(width: int) -> tuple[float, float]:
    """How far a bfloat16 logit can lie from the float32 one: the first times |w||h|, plus the second times the logit itself.

    With u = 2⁻⁸, rounding the factors makes of each product w·h one of at most (1 + u)²|w·h|, so by Cauchy and Schwarz the
    sum changes by at most ((1 + u)² - 1)|w||h|. The products of two bfloat16 numbers are exact in float32; summing ``width``
    of them there, in any order, errs by γ = width·2⁻²⁴ / (1 - width·2⁻²⁴) of the sum of their sizes (Higham, Accuracy and
    Stability of Numerical Algorithms, §3.1), and so do the float32 logit and each of the norms. Rounding the result to
    bfloat16 changes it by at most u of the exact sum, which is u / (1 - u) of what is seen.
    """
    u = _BFLOAT16
    gamma = width * _FLOAT32 / (1 - width * _FLOAT32)
    return ((1 + u) ** 2 * (1 + gamma) - 1 + gamma) * (1 + gamma) ** 2, u / (1 - u) + 2 * _FLOAT32


@functools.cache
def native_bfloat16(device: str) -> bool:
    """Whether the machine multiplies matrices of bfloat16 by itself, faster than those of float32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return device == "cpu" and any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _fill_padding(hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Padding replaced by its row's first token, which leaves every maximum as it is.

    Saves a pass over the logits to mask them. Returns the tokens, (batch x length, width), and the
    position each came from, (batch, length).
    """
    batch, length, width = hidden.shape
    mask = mask.bool()
    position = torch.arange(length, device=hidden.device).expand(batch, length)
    source = torch.where(mask, position, mask.int().argmax(dim=1, keepdim=True))
    return hidden.gather(1, source.unsqueeze(-1).expand(-1, -1, width)).reshape(-1, width), source


def _tiles(weight: Tensor, tokens: Tensor) -> Any:
    """``weight @ tokens.T`` a few terms at a time, each tile in the same memory: (start, end, logits).

    Fresh memory for every tile would cost as much as the product itself.
    """
    columns = tokens.T
    height = max(64, _TILE_BYTES // (columns.element_size() * max(1, columns.shape[1])))
    buffer = columns.new_empty(min(height, len(weight)), columns.shape[1])
    for start in range(0, len(weight), height):
        end = min(len(weight), start + height)
        yield start, end, torch.mm(weight[start:end].to(columns.dtype), columns, out=buffer[: end - start])


def _activation(logits: Tensor, bias: Tensor | None, start: int, end: int, dtype: torch.dtype, double_log: bool) -> Tensor:
    activation = logits.to(dtype)
    if bias is not None:
        activation += bias[start:end].to(dtype).unsqueeze(1)
    activation = activation.relu_().log1p_()
    return activation.log1p_() if double_log else activation


def _slope(result: Tensor, double_log: bool) -> Tensor:
    """Of log1p(x) at x, written with y = log1p(x): 1 / (1 + x) = exp(-y)."""
    slope = torch.exp(-result)
    return slope * torch.exp(-torch.expm1(result)) if double_log else slope


def _sums(rows: Tensor, columns: Tensor, values: Tensor, dense: Tensor, count: int) -> Tensor:
    """A sparse matrix of ``count`` rows, its entries sorted by row, times a dense one: (count, width).

    Each row is summed by itself and in order, so the result is the same every time, on a GPU too;
    half-precision products are summed in float32.
    """
    starts = torch.searchsorted(rows, torch.arange(count + 1, device=rows.device))
    return embedding_bag(columns, dense, starts, mode="sum", per_sample_weights=values, include_last_offset=True)
