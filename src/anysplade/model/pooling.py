"""SPLADE pooling fused with the vocabulary projection.

``max (or sum) over tokens of log1p(relu(W h + b))`` without the (batch, length, vocabulary) logits:
the projection runs in tiles of the vocabulary, and of each tile only what pooling needs is kept.

For max pooling that is the maximum over the tokens, since the activation is monotone. Backward, each
(sequence, term) touches the one token that held its maximum, so both gradients are sparse products
with at most batch x vocabulary entries instead of dense ones with batch x length x vocabulary.
Sum pooling touches every token; it computes each tile's logits a second time in backward.

Exact: outputs and gradients are those of the unfused modules up to the order of float additions.
Under autocast the products run in autocast's type and all that follows in float32.

Encoding on a CPU with int8 products is exact and faster still: the product runs in int8 first, and
only entries that its error bound leaves a chance to be above zero are computed in float32. A trained
model has a few hundred of them in a text. The weight in int8 is made once and kept until it changes.
"""

import functools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag
from torch.utils.weak import WeakTensorKeyDictionary

# Of logits at a time. A CPU reduces them while they lie in its cache; a GPU wants few launches.
_TILE_BYTES = {"cpu": 8 * 2**20}
_DEVICE_TILE_BYTES = 256 * 2**20
_SCREENED_SHARE = 0.2  # of the entries: where more may be above zero, screening costs more than it saves
_FEW_TOKENS = 64  # of a product whose time is that of reading the weight
_FLOAT32 = 2.0**-24  # unit roundoff: half of torch.finfo(torch.float32).eps, which is the distance of 1 from the next number


# Inside a compiled model it runs as it is: how many entries backward has depends on the data.
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

    Args:
        hidden: (batch, length, width).
        weight: (vocabulary, width).
        bias: (vocabulary,) or None.
        mask: (batch, length), nonzero where there is a token. A row without tokens pools to zeros.
        pooling: over the tokens; arXiv 2107.05720 sums, arXiv 2109.10086 takes the maximum.
        double_log: log1p twice, the activation of arXiv 2504.14839.
        live: ids of the terms that are computed, ascending; the others are 0. None for all.

    Returns:
        (batch, vocabulary), at least 0; float32 under autocast, else of hidden's type. Where tokens
        tie for the maximum, one of them gets the gradient.

    Memory: two to three numbers a (sequence, term), 8 MiB of logits at a time (256 MiB on a GPU), and the gradients;
    without gradients on a CPU with int8 products also the weight in int8, twice.
    """
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.float32 if autocast else hidden.dtype
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    with torch.autocast(device, enabled=False):
        if keep:
            _screens.pop(weight, None)  # the weight is about to change
        elif pooling == "max" and device == "cpu" and torch.float64 not in (hidden.dtype, weight.dtype) and native_int8():
            screened = _screened_max(hidden, weight, bias, mask, double_log, live)
            if screened is not None:
                return screened.to(dtype)
        if autocast:
            half = torch.get_autocast_dtype(device)
            hidden, weight = hidden.to(half), weight.to(half)
        if pooling == "sum":
            return _SumPool.apply(hidden, weight, bias, mask, double_log, dtype, live)
        return _MaxPool.apply(hidden, weight, bias, mask, double_log, dtype, keep, live)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def max_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
    """The largest logit of each term over a text's tokens, with no activation; arguments, memory and type as in ``splade_pool``.

    Returns:
        (batch, vocabulary); a row without tokens has the logits of its first padding.
    """
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.float32 if autocast else hidden.dtype
    with torch.autocast(device, enabled=False):
        if autocast:
            half = torch.get_autocast_dtype(device)
            hidden, weight = hidden.to(half), weight.to(half)
        return _MaxPool.apply(hidden, weight, bias, mask, None, dtype, True, None)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor,
        double_log: bool | None,  # None: the logits as they are
        dtype: torch.dtype,
        keep: bool,
        live: Tensor | None,
    ) -> Tensor:
        batch, length, _ = hidden.shape
        terms = _count(weight, live)
        tokens, source = _fill_padding(hidden, mask)
        pooled = hidden.new_empty(terms, batch, dtype=dtype)
        chosen = torch.empty(terms if keep else 0, batch, dtype=torch.int32, device=hidden.device)
        for start, end, logits in _products(weight, tokens, live):
            logits = logits.view(end - start, batch, length)  # tokens last: fast to reduce
            if keep:
                values, chosen[start:end] = logits.max(dim=2)
            else:
                values = logits.amax(dim=2)
            pooled[start:end] = values
        if bias is not None:
            pooled += bias[_terms(live, 0, terms)].to(dtype).unsqueeze(1)
        if double_log is not None:
            pooled.relu_().masked_fill_(~mask.bool().any(dim=1), 0).log1p_()
        if double_log:
            pooled.log1p_()
        result = pooled.T.contiguous()  # (batch, terms)
        if keep:
            ctx.save_for_backward(tokens, weight, bias, source, chosen, result, live)
            ctx.double_log = double_log
        return _spread(result, live, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight, bias, source, chosen, result, live = ctx.saved_tensors
        batch, length = source.shape
        gradient = gradient if live is None else gradient[:, live]
        if ctx.double_log is not None:
            gradient = gradient * _slope(result, ctx.double_log) * (result > 0)
        through = gradient.T  # (terms, batch)
        term, row = through.nonzero(as_tuple=True)  # sorted by term
        token = source[row, chosen[term, row].long()] + row * length
        values = through[term, row].to(tokens.dtype)
        term = term if live is None else live[term]
        to_hidden = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            order = token.argsort(stable=True)
            to_hidden = _sums(token[order], term[order], values[order], weight.to(tokens.dtype), len(tokens))
            to_hidden = to_hidden.view(batch, length, -1)
        if ctx.needs_input_grad[1]:
            to_weight = _sums(term, token, values, tokens, len(weight)).to(weight.dtype)
        if bias is not None and ctx.needs_input_grad[2]:
            to_bias = _spread(through.sum(dim=1), live, len(weight)).to(bias.dtype)
        return to_hidden, to_weight, to_bias, None, None, None, None, None


class _SumPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor,
        double_log: bool,
        dtype: torch.dtype,
        live: Tensor | None,
    ) -> Tensor:
        batch, length, width = hidden.shape
        tokens = hidden.reshape(-1, width)
        pooled = hidden.new_empty(_count(weight, live), batch, dtype=dtype)
        for start, end, logits in _products(weight, tokens, live):
            activation = _activation(logits, None if bias is None else bias[_terms(live, start, end)], dtype, double_log)
            pooled[start:end] = activation.view(-1, batch, length).mul_(mask.to(dtype)).sum(dim=2)
        ctx.save_for_backward(tokens, weight, bias, mask, live)
        ctx.double_log, ctx.dtype = double_log, dtype
        return _spread(pooled.T.contiguous(), live, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight, bias, mask, live = ctx.saved_tensors
        batch, length = mask.shape
        gradient = gradient if live is None else gradient[:, live]
        to_hidden = tokens.new_zeros(tokens.shape, dtype=ctx.dtype)
        to_weight = torch.zeros_like(weight)
        to_bias = None if bias is None else torch.zeros_like(bias)
        for start, end, logits in _products(weight, tokens, live):
            terms = _terms(live, start, end)
            activation = _activation(logits, None if bias is None else bias[terms], ctx.dtype, ctx.double_log)
            through = (_slope(activation, ctx.double_log) * (activation > 0)).view(-1, batch, length)
            through = (through * gradient.T[start:end].unsqueeze(2) * mask.to(ctx.dtype)).view(end - start, -1)
            if to_bias is not None:
                to_bias[terms] = through.sum(dim=1).to(to_bias.dtype)
            through = through.to(tokens.dtype)
            to_hidden += through.T @ weight[terms].to(tokens.dtype)
            to_weight[terms] = (through @ tokens).to(to_weight.dtype)
        return to_hidden.to(tokens.dtype).view(batch, length, -1), to_weight, to_bias, None, None, None, None


class _Screen(NamedTuple):
    """A weight in int8, and how far a logit of it can lie from the exact one; see ``_screened_max``."""

    of: Tensor  # the weight as it was: the same memory, kept so that nothing else can come to lie there
    live: Tensor | None  # the terms that it has; all if None
    version: int
    rounded: Tensor  # (terms, width), int8
    scale: Tensor  # (terms,), of the rows
    of_lost: Tensor  # (terms,), of the error, times the norm of what rounding took from a token
    of_norm: Tensor  # (terms,), likewise, times the norm of a token
    finite: bool
    packed: Tensor | None  # the rounded weight in oneDNN's own order, for few tokens; None where it cannot be had


_screens = WeakTensorKeyDictionary()  # of weights


@torch.no_grad()
def _screen(weight: Tensor, live: Tensor | None = None) -> _Screen:
    """The weight's screen, made once until the weight changes."""
    counted = not weight.is_inference()  # nothing counts the changes of one made in inference mode
    known: _Screen | None = _screens.get(weight)
    if known is not None and counted and known.of.data_ptr() == weight.data_ptr() and known.version == weight._version:
        same = known.live is live or (known.live is not None and live is not None and torch.equal(known.live, live))
        if same:
            return known
    terms = _count(weight, live)
    rounded = torch.empty(terms, weight.shape[1], dtype=torch.int8)
    scale, norm, lost = weight.new_empty(3, terms, dtype=torch.float32)
    for start in range(0, terms, 4096):
        part = slice(start, start + 4096)
        rows = weight[_terms(live, start, start + 4096)]
        rounded[part], scale[part], norm[part], lost[part] = _round(rows.float(), 1)
    version, finite = weight._version if counted else -1, bool(lost.isfinite().all())
    packed = torch.ops.onednn.qlinear_prepack(rounded, None) if _packing_works() else None
    gamma = weight.shape[1] * _FLOAT32 / (1 - weight.shape[1] * _FLOAT32)
    slack = 2 * gamma + 24 * _FLOAT32
    of_lost, of_norm = norm * (1 + slack), lost * (1 + slack) + slack * (norm + lost)
    made = _Screen(weight.detach(), live, version, rounded, scale, of_lost, of_norm, finite, packed)
    if counted:
        _screens[weight] = made
    return made


def _round(vectors: Tensor, dims: int | tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Vectors, (..., width), in int8 with one scale for all of ``dims``.

    Returns:
        The whole numbers, the scale, the norms of the rounded vectors, and those of what rounding took away.
    """
    scale = (vectors.abs().amax(dims) / 127).clamp_min(1e-30)
    spread = scale.reshape(scale.shape + (1,) * (vectors.dim() - scale.dim()))
    rounded = (vectors / spread).round_().clamp_(-127, 127)
    exact = rounded * spread
    return rounded.to(torch.int8), scale, exact.norm(dim=-1), (vectors - exact).norm(dim=-1)


@torch.no_grad()
def _screened_max(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, double_log: bool, live: Tensor | None = None
) -> Tensor | None:
    """Max pooling in float32 by way of int8; None if too many entries may be above zero, or a number is NaN or infinite.

    An entry is computed in float32 unless its value in int8 lies below zero by more than the error can be. With the rows
    w = ŵ + r of the weight and the tokens h = ĥ + s, where ŵ and ĥ are multiples of whole numbers up to 127 and r and s are
    what rounding took away, w·h - ŵ·ĥ = ŵ·s + r·h, by Cauchy and Schwarz at most |ŵ||s| + |r||h|. Products of the whole
    numbers are summed exactly. To that comes what float32 rounds: by Higham, Accuracy and Stability of Numerical Algorithms,
    §3.1, a sum of ``width`` products errs by γ = width·2⁻²⁴ / (1 - width·2⁻²⁴) of the sum of their sizes, in the float32 logit and
    in the norms; scaling, adding the bias and rounding in ``_round`` err by a few units more.
    """
    batch, length, width = hidden.shape
    if width == 1 or (live is not None and not len(live)):  # torch._int_mm (2.13) gives uninitialised memory
        return None
    hidden = hidden.float()
    tokens, _ = _fill_padding(hidden, mask)
    texts = tokens.view(batch, length, width)
    rounded, scale, norms, lost = _round(texts, (1, 2))
    screen = _screen(weight, live)
    if not (lost.isfinite().all() and screen.finite):
        return None
    longest, lost = (norms + lost).amax(dim=1, keepdim=True), lost.amax(dim=1, keepdim=True)  # (batch, 1)
    found_in, found = [], []
    count = len(screen.rounded)
    most = int(_SCREENED_SHARE * batch * count)
    rounded = rounded.view(-1, width)
    few = len(rounded) <= _FEW_TOKENS and screen.packed is not None
    for start, end in [(0, count)] if few else _tiles(count, 4 * len(rounded), hidden.device):
        if few:
            products = _packed_product(rounded, screen.packed, screen.scale)
            rough = products.view(batch, length, -1).amax(dim=1) * scale.unsqueeze(1)
        else:
            products = torch._int_mm(rounded, screen.rounded[start:end].T)
            rough = products.view(batch, length, -1).amax(dim=1) * screen.scale[start:end] * scale.unsqueeze(1)
        error = screen.of_lost[start:end] * lost + screen.of_norm[start:end] * longest
        if bias is not None:
            part = bias[_terms(live, start, end)]
            rough += part
            error.add_(part.abs(), alpha=2 * _FLOAT32)  # the sum is rounded, here and in float32
        row, term = (~(rough + error <= 0)).nonzero(as_tuple=True)  # a bias of NaN too, which must be seen
        most -= len(term)
        if most < 0:
            return None
        found_in.append(row)
        found.append(term + start)
    row, term = torch.cat(found_in), torch.cat(found)
    term = term if live is None else live[term]
    result = hidden.new_zeros(batch, len(weight))
    for i in mask.bool().any(dim=1).nonzero()[:, 0].tolist():
        chosen = term[row == i]
        values = (weight[chosen].float() @ texts[i].T).amax(dim=1)
        if bias is not None:
            values += bias[chosen]
        result[i, chosen] = values.relu_().log1p_()
    return result.log1p_() if double_log else result


def _packed_product(rounded: Tensor, packed: Any, scale: Tensor) -> Tensor:
    """``rounded @ weight.T * scale`` in float32, whose weight is packed: half the time of ``torch._int_mm`` for few tokens."""
    unsigned = (rounded.to(torch.int16) + 128).to(torch.uint8)  # signed ones take hundreds of times as long
    zeros = _zeros(len(scale))
    of_tokens, of_result = (1.0, 128), (1.0, 0, torch.float32)  # scale and zero point
    return torch.ops.onednn.qlinear_pointwise(unsigned, *of_tokens, packed, scale, zeros, None, *of_result, "none", [], "")


@functools.cache
def _zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)


@functools.cache
def _packing_works() -> bool:
    """Whether this torch has the two functions, which are not documented, and they give what they should."""
    rounded = torch.arange(-64, 64).to(torch.int8).view(2, 64)
    weight = torch.arange(-128, 128).to(torch.int8).repeat(64).view(256, 64)
    try:
        got = _packed_product(rounded, torch.ops.onednn.qlinear_prepack(weight, None), torch.ones(256))
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(got, rounded.float() @ weight.float().T)


@functools.cache
def native_int8() -> bool:
    """Whether the processor multiplies matrices of int8 by itself, several times as fast as those of float32."""
    return _cpu_has("avx512_vnni", "amx_int8")


@functools.cache
def native_bfloat16(device: str) -> bool:
    """Whether the machine multiplies matrices of bfloat16 by itself, faster than those of float32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and _cpu_has("avx512_bf16", "amx_bf16", "bf16")


def _cpu_has(*names: str) -> bool:
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(name) for name in names)


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


def _tiles(vocabulary: int, bytes_a_term: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """The vocabulary a few terms at a time: (start, end)."""
    height = max(64, _TILE_BYTES.get(device.type, _DEVICE_TILE_BYTES) // max(1, bytes_a_term))
    for start in range(0, vocabulary, height):
        yield start, min(vocabulary, start + height)


def _terms(live: Tensor | None, start: int, end: int) -> Any:
    """What picks a few of the terms that are computed out of all."""
    return slice(start, end) if live is None else live[start:end]


def _count(weight: Tensor, live: Tensor | None) -> int:
    """How many terms are computed."""
    return len(weight) if live is None else len(live)


def _spread(values: Tensor, live: Tensor | None, count: int) -> Tensor:
    """Values of the live terms, (..., terms), among all: (..., count)."""
    if live is None:
        return values
    return values.new_zeros(*values.shape[:-1], count).index_copy_(-1, live, values)


def _products(weight: Tensor, tokens: Tensor, live: Tensor | None) -> Iterator[tuple[int, int, Tensor]]:
    """``weight @ tokens.T`` a few terms at a time, each tile in the same memory: (start, end, logits).

    Fresh memory for every tile would cost as much as the product itself.
    """
    columns = tokens.T
    buffer: Tensor | None = None
    for start, end in _tiles(_count(weight, live), columns.element_size() * columns.shape[1], columns.device):
        if buffer is None:
            buffer = columns.new_empty(end, columns.shape[1])
        yield start, end, torch.mm(weight[_terms(live, start, end)].to(columns.dtype), columns, out=buffer[: end - start])


def _activation(logits: Tensor, bias: Tensor | None, dtype: torch.dtype, double_log: bool) -> Tensor:
    activation = logits.to(dtype)
    if bias is not None:
        activation += bias.to(dtype).unsqueeze(1)
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
