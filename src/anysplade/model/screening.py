"""Max pooling in float32 with the help of int8 products, for encoding on a CPU that has them.

The product runs in int8 first, and only the entries that may be above zero within its error bound are computed in float32. A
trained model has a few hundred of them per text. The weight in int8, its *screen*, is made once and kept until the weight changes.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from anysplade.model.tiles import count_terms, fill_padding, index_terms, tiles

_MAX_SHARE = 0.2  # of the entries: if more may be above zero, screening costs more than it saves
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


_screens = WeakTensorKeyDictionary()  # of weights


def drop_screen(weight: Tensor) -> None:
    """Forget the screen of a weight."""
    _screens.pop(weight, None)


@torch.no_grad()
def screened_max(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, double_log: bool, live: Tensor | None = None
) -> Tensor | None:
    """Max pooling in float32, (batch, vocabulary); None if too many entries may be above zero, or if NaN or infinity occurs.

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
    hidden = hidden.float()
    tokens, _ = fill_padding(hidden, mask)
    texts = tokens.view(batch, length, width)
    rounded, scale, norms, lost = _round(texts, (1, 2))
    screen = _screen(weight, live)
    if not (lost.isfinite().all() and screen.finite):
        return None
    longest, lost = (norms + lost).amax(dim=1, keepdim=True), lost.amax(dim=1, keepdim=True)  # (batch, 1)
    found_rows, found_terms = [], []
    count = len(screen.rounded)
    left = int(_MAX_SHARE * batch * count)
    rounded = rounded.view(-1, width)
    few = len(rounded) <= _FEW_TOKENS and screen.packed is not None
    for start, end in [(0, count)] if few else tiles(count, 4 * len(rounded), hidden.device):
        if few:
            products = _packed_product(rounded, screen.packed, screen.scale)
            rough = products.view(batch, length, -1).amax(dim=1) * scale.unsqueeze(1)
        else:
            products = torch._int_mm(rounded, screen.rounded[start:end].T)
            rough = products.view(batch, length, -1).amax(dim=1) * screen.scale[start:end] * scale.unsqueeze(1)
        error = screen.norm_factor[start:end] * lost + screen.lost_factor[start:end] * longest
        if bias is not None:
            part = bias[index_terms(live, start, end)]
            rough += part
            error.add_(part.abs(), alpha=2 * _FLOAT32)  # the sum is rounded, here and in float32
        row, term = (~(rough + error <= 0)).nonzero(as_tuple=True)  # true for NaN too, which must not be lost
        left -= len(term)
        if left < 0:
            return None
        found_rows.append(row)
        found_terms.append(term + start)
    row, term = torch.cat(found_rows), torch.cat(found_terms)
    term = term if live is None else live[term]
    result = hidden.new_zeros(batch, len(weight))
    for i in mask.bool().any(dim=1).nonzero()[:, 0].tolist():
        chosen = term[row == i]
        values = (weight[chosen].float() @ texts[i].T).amax(dim=1)
        if bias is not None:
            values += bias[chosen]
        result[i, chosen] = values.relu_().log1p_()
    return result.log1p_() if double_log else result


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
