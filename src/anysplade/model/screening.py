"""Max pooling in float32 with the help of int8 products, for encoding on a CPU that has them.

The product runs in int8 first, and only the entries that may be above zero within its error bound are computed in float32. A
trained model has a few hundred of them per text. The weight in int8, its *screen*, is made once and kept until the weight changes.
A sample of the terms tells whether so many entries may be above zero that computing all of them is faster.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from anysplade.model.tiles import count_terms, fill_padding, index_terms, tiles

# Time of an entry in units of its int8 product with one token, measured at a width of 384 on AVX-512: the other products per token,
# pooling them, and for an entry that may be above zero, reading its term's weights and a product per token.
_FLOAT32_COST, _BFLOAT16_COST, _POOL_COST, _READ_COST, _TOKEN_COST = 2.9, 1.4, 10.0, 350.0, 1.7
_FEW_SHARE = 0.2  # of the entries that may be above zero, for few tokens, where each product takes the time of reading the weights
_SAMPLE = slice(None, None, 32)  # of the terms
_FEW_TOKENS = 64  # up to here, reading the weight takes most of a product's time
_ROWS = 4096  # of the weight that are rounded at once
_FLOAT32 = 2.0**-24  # unit roundoff: half of torch.finfo(torch.float32).eps, which is the distance from 1 to the next number


class _Screen(NamedTuple):
    """A weight in int8, with the factors of its error bound; see ``screened_max``."""

    weight: Tensor  # in full precision; shares the memory, which therefore cannot be reused for another tensor
    live: Tensor | None  # ids of its terms; None for all
    version: int  # of the weight: torch counts the changes
    rounded: Tensor  # (terms, width), int8
    scale: Tensor  # (terms,), of each row
    norm_factor: Tensor  # (terms,): |ŵ|, multiplies the norm of the rounding error of a token
    lost_factor: Tensor  # (terms,): |r|, multiplies the norm of a token
    finite: bool
    packed: Tensor | None  # the rounded weight in oneDNN's own order, for few tokens; None if not available
    sample: Tensor  # rows of the rounded weight


_screens = WeakTensorKeyDictionary()  # of weights


def drop_screen(weight: Tensor) -> None:
    """Forget the screen of a weight."""
    _screens.pop(weight, None)


@torch.no_grad()
def screened_max(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    double_log: bool,
    live: Tensor | None = None,
    in_bfloat16: bool = False,
) -> Tensor | None:
    """Max pooling in float32, (batch, vocabulary); None if too many entries may be above zero, or if NaN or infinity occurs.

    ``in_bfloat16`` says that None leads to products in bfloat16, which are faster than those in float32.

    An entry is computed in float32 unless its int8 value is below zero by more than its error bound. Let the rows of the weight be
    w = ŵ + r and the tokens h = ĥ + s, where ŵ and ĥ are multiples of whole numbers up to 127, and r and s are the rounding errors.
    Then w·h - ŵ·ĥ = ŵ·s + r·h, which by Cauchy-Schwarz is at most |ŵ||s| + |r||h|. Products of the whole numbers are summed
    exactly. The rounding of float32 adds to the bound: by Higham, Accuracy and Stability of Numerical Algorithms, §3.1, a sum of
    ``width`` products errs by at most γ = width·2⁻²⁴ / (1 - width·2⁻²⁴) of the sum of their sizes, in the float32 logit and in the
    norms. Scaling, adding the bias and the rounding in ``_round`` err by a few units more.
    """
    batch, length, width = hidden.shape
    if width == 1 or (live is not None and not len(live)):  # torch._int_mm (2.13) returns uninitialised memory
        return None
    screen = _screen(weight, live)
    hidden = hidden.float()
    tokens, _ = fill_padding(hidden, mask)
    texts = tokens.view(batch, length, width)
    rounded, scale, norms, lost = _round(texts, (1, 2))
    if not (lost.isfinite().all() and screen.finite):
        return None
    longest, lost = (norms + lost).amax(dim=1, keepdim=True), lost.amax(dim=1, keepdim=True)  # (batch, 1)

    def candidates(terms: slice, rough: Tensor) -> Tensor:
        """Which entries may be above zero, (batch, terms), given the int8 values of these terms."""
        error = screen.norm_factor[terms] * lost + screen.lost_factor[terms] * longest
        if bias is not None:
            part = bias[terms] if live is None else bias[live[terms]]
            rough = rough + part
            error.add_(part.abs(), alpha=2 * _FLOAT32)  # the sum is rounded, here and in float32
        return ~(rough + error <= 0)  # true for NaN too, which must not be lost

    def largest(rows: Tensor, terms: slice) -> Tensor:
        products = torch._int_mm(rounded, rows.T)
        return products.view(batch, length, -1).amax(dim=1) * screen.scale[terms] * scale.unsqueeze(1)

    rounded, count = rounded.view(-1, width), len(screen.rounded)
    few = len(rounded) <= _FEW_TOKENS
    most = _FEW_SHARE if few else _worthwhile_share(length, in_bfloat16)
    if few and screen.packed is not None:
        products = _packed_product(rounded, screen.packed, screen.scale)
        found = candidates(slice(0, count), products.view(batch, length, -1).amax(dim=1) * scale.unsqueeze(1))
        row, term = found.nonzero(as_tuple=True)
        if len(term) > most * found.numel():
            return None
    else:
        sampled = candidates(_SAMPLE, largest(screen.sample, _SAMPLE))
        if sampled.sum() > most * sampled.numel():
            return None
        parts = []
        for start, end in tiles(count, 4 * len(rounded), hidden.device):
            row, term = candidates(slice(start, end), largest(screen.rounded[start:end], slice(start, end))).nonzero(as_tuple=True)
            parts.append((row, term + start))
        row, term = (torch.cat(part) for part in zip(*parts, strict=True))
    term = term if live is None else live[term]
    result = hidden.new_zeros(batch, len(weight))
    for i in mask.bool().any(dim=1).nonzero()[:, 0].tolist():
        chosen = term[row == i]
        values = (weight[chosen].float() @ texts[i].T).amax(dim=1)
        if bias is not None:
            values += bias[chosen]
        result[i, chosen] = values.relu_().log1p_()
    return result.log1p_() if double_log else result


def _worthwhile_share(length: int, in_bfloat16: bool) -> float:
    """The share of entries that may be above zero up to which screening is faster than all products."""
    saved = ((_BFLOAT16_COST if in_bfloat16 else _FLOAT32_COST) - 1) * length + _POOL_COST
    return saved / (_READ_COST + _TOKEN_COST * length)


@torch.no_grad()
def _screen(weight: Tensor, live: Tensor | None = None) -> _Screen:
    """The screen of a weight, made anew only after the weight has changed."""
    counted = not weight.is_inference()  # torch counts no changes of a tensor that was made in inference mode
    known: _Screen | None = _screens.get(weight)
    if known is not None and counted and known.weight.data_ptr() == weight.data_ptr() and known.version == weight._version:
        same = known.live is live or (known.live is not None and live is not None and torch.equal(known.live, live))
        if same:
            return known
    terms = count_terms(weight, live)
    rounded = torch.empty(terms, weight.shape[1], dtype=torch.int8)
    scale, norm, lost = weight.new_empty(3, terms, dtype=torch.float32)
    for start in range(0, terms, _ROWS):
        part = slice(start, start + _ROWS)
        rows = weight[index_terms(live, start, start + _ROWS)]
        rounded[part], scale[part], norm[part], lost[part] = _round(rows.float(), 1)
    gamma = weight.shape[1] * _FLOAT32 / (1 - weight.shape[1] * _FLOAT32)
    slack = 2 * gamma + 24 * _FLOAT32
    made = _Screen(
        weight=weight.detach(),
        live=live,
        version=weight._version if counted else -1,
        rounded=rounded,
        scale=scale,
        norm_factor=norm * (1 + slack),
        lost_factor=lost * (1 + slack) + slack * (norm + lost),
        finite=bool(lost.isfinite().all()),
        packed=torch.ops.onednn.qlinear_prepack(rounded, None) if _packing_works() else None,
        sample=rounded[_SAMPLE].contiguous(),
    )
    if counted:
        _screens[weight] = made
    return made


def _round(vectors: Tensor, dims: int | tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Round vectors, (..., width), to int8 with one scale for all of ``dims``.

    Returns:
        The whole numbers, the scale, the norms of the rounded vectors, and the norms of the rounding errors.
    """
    scale = (vectors.abs().amax(dims) / 127).clamp_min(1e-30)
    factor = scale.reshape(scale.shape + (1,) * (vectors.dim() - scale.dim()))
    rounded = (vectors / factor).round_().clamp_(-127, 127)
    exact = rounded * factor
    return rounded.to(torch.int8), scale, exact.norm(dim=-1), (vectors - exact).norm(dim=-1)


def _packed_product(rounded: Tensor, packed: Any, scale: Tensor) -> Tensor:
    """``rounded @ weight.T * scale`` in float32 with a packed weight: takes half the time of ``torch._int_mm`` for few tokens."""
    unsigned = (rounded.to(torch.int16) + 128).to(torch.uint8)  # signed numbers take hundreds of times as long
    zeros = _zeros(len(scale))
    of_tokens, of_result = (1.0, 128), (1.0, 0, torch.float32)  # scale and zero point
    return torch.ops.onednn.qlinear_pointwise(unsigned, *of_tokens, packed, scale, zeros, None, *of_result, "none", [], "")


@functools.cache
def _zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)


@functools.cache
def _packing_works() -> bool:
    """Whether this torch has the two undocumented functions of oneDNN, and they compute the right product."""
    rounded = torch.arange(-64, 64).to(torch.int8).view(2, 64)
    weight = torch.arange(-128, 128).to(torch.int8).repeat(64).view(256, 64)
    try:
        got = _packed_product(rounded, torch.ops.onednn.qlinear_prepack(weight, None), torch.ones(256))
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(got, rounded.float() @ weight.float().T)
