"""Rescale an MLM head: fold ``logits / k - shift`` into its weight and bias, so that the result is a stock checkpoint.

Pretraining fixes neither the scale of the logits nor their level, because softmax ignores a constant. SPLADE depends on both.
"""

import logging
import math
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from anysplade import __version__
from anysplade.errors import ModelError, OptionError
from anysplade.model.head import (
    DEAD,
    RECORD,
    find_head,
    live_terms,
    require_masked_lm,
    sample_logits,
    share_tied,
    switched_off,
    untie_head,
)
from anysplade.model.options import BiasPolicy

logger = logging.getLogger(__name__)


def rescale_head(model: PreTrainedModel, k: float = 8.0, shift: float = 0.0, bias: BiasPolicy = "scale") -> PreTrainedModel:
    """Change the logits to ``logits / k - shift``, in place; the encoder stays as it is.

    With k ≠ 1, a tied decoder is untied first: the input embeddings keep their scale, the decoder gets its own weight (the
    checkpoint grows by vocabulary x width numbers), and ``tie_word_embeddings`` is switched off. With k = 1 only the bias
    changes, and ties and size stay.

    Args:
        model: a masked LM of transformers.
        k: divides the decoder's weight, as in arXiv 2606.18811; finite and above 0.
        shift: is subtracted from every logit, by way of the bias.
        bias: ``"scale"`` divides the bias by k too, so the formula holds; ``"keep"`` gives ``W h / k + b - shift``.

    Returns:
        The same model. Its config records k, shift, bias, and where the model came from.

    Raises:
        OptionError: k is not a positive finite number, shift is not finite, or bias has another value.
        ModelError: there is no head, no bias to shift, or the logits are not ``W h + b``. The model is unchanged then.
    """
    require_masked_lm(model)
    check_rescaling(k, shift, bias)
    if k == 1 and shift == 0:
        return model
    share_tied(model)
    head = find_head(model)
    if shift != 0 and not head.biases:
        raise ModelError(f"{type(model).__name__}: the MLM head has no bias, so it cannot be shifted; use `shift=0` and k alone")
    earlier = dict(getattr(model.config, RECORD, None) or {})
    folding = {"folding": earlier.pop("folding")} if "folding" in earlier else {}
    if earlier:
        message = "this head was rescaled before (k=%g, shift=%g); k=%g and shift=%g are applied on top"
        logger.warning(message, earlier["k"], earlier["shift"], k, shift)
    before = sample_logits(model)
    offset = 0.0 if head.bias is None or bias == "scale" else head.bias.float() * (1 - 1 / k)
    undo = _apply(model, k, shift, bias)
    after, wanted = sample_logits(model), before / k + offset - shift
    if (live := live_terms(model)) is not None:
        before, after, wanted = before[..., live], after[..., live], wanted[..., live]
    tolerance = 64 * torch.finfo(head.decoder.weight.dtype).eps * max(1.0, float(before.abs().max()) / min(1.0, k), abs(shift))
    if not torch.allclose(after, wanted, rtol=0, atol=tolerance):
        undo()
        raise ModelError(
            f"{type(model).__name__}: its logits are not one projection of its hidden states; k and shift cannot be folded into it"
        )
    source = str(model.name_or_path or type(model).__name__)
    record = {"k": float(k), "shift": float(shift), "bias": bias, "source": source, "version": __version__}
    setattr(model.config, RECORD, record | folding | ({"earlier": earlier} if earlier else {}))
    return model


def check_rescaling(k: float, shift: float, bias: str) -> None:
    """Raise OptionError unless k, shift and bias are usable."""
    if not (math.isfinite(k) and k > 0):
        raise OptionError(f"k is {k:g}: the head is divided by it, so it must be a finite number above 0")
    if not math.isfinite(shift):
        raise OptionError(f"shift is {shift:g}: it must be a finite number")
    if bias not in ("scale", "keep"):
        raise OptionError(f"bias is {bias!r}: it must be 'scale' (divided by k, the default) or 'keep'")


def formula(k: float, shift: float) -> str:
    """``logits / k - shift`` in numbers."""
    return f"logits / {k:g} {'+' if shift < 0 else '-'} {abs(shift):g}"


def _apply(model: PreTrainedModel, k: float, shift: float, bias: BiasPolicy) -> Callable[[], None]:
    """Change weight and bias; returns a function that restores them."""
    tie_again = untie_head(model) if k != 1 else lambda: None
    head = find_head(model)
    changed = [(t, t.detach().clone()) for t in (head.decoder.weight, *head.biases)]
    with torch.no_grad():
        head.decoder.weight /= k
        for tensor in head.biases:
            off = switched_off(tensor)
            if bias == "scale":
                tensor /= k
            tensor -= shift
            tensor[off] = DEAD

    def undo() -> None:
        with torch.no_grad():
            for tensor, old in changed:
                tensor.copy_(old)
        tie_again()

    return undo
