"""A new MLM head for an encoder that has none, before its training."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from anysplade.errors import ModelError
from anysplade.model.checkpoints import fit_tokenizer, masked_lm_class, missing_is_expected, missing_weights
from anysplade.model.fused import why_not_fused
from anysplade.model.head import find_head


def check_encoder(source: str, folder: str) -> None:
    """Raise ModelError, before the text is read, if an encoder cannot get an MLM head; arguments as in ``with_new_head``."""
    model_class = masked_lm_class(source, folder)
    missing = missing_weights(model_class, source, folder)
    body = [key for key in missing if key.startswith(f"{model_class.base_model_prefix}.")]
    if body:
        raise ModelError(f"{source}: the checkpoint lacks weights ({body[0]} is one of {len(body)}); was it saved whole?")
    if not missing:
        raise ModelError(f"{source}: has an MLM head already; use it as it is, as the backbone of `anysplade train`")


def with_new_head(source: str, folder: str = "") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open an encoder as a masked LM with a new head, whose decoder is tied to the input embeddings, and its tokenizer.

    A square projection in the head starts as the identity; other new weights start as transformers initializes them. ``folder`` is
    the subfolder of the source that has the encoder.
    """
    missing = set(missing_weights(masked_lm_class(source, folder), source, folder))
    options: dict[str, Any] = {"subfolder": folder, "trust_remote_code": False}
    with missing_is_expected():
        model = AutoModelForMaskedLM.from_pretrained(source, dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    fit_tokenizer(tokenizer, model, source)
    if tokenizer.mask_token_id is None:
        raise ModelError(f"{source}: its tokenizer has no mask token, so a head cannot be trained on its text; use another encoder")
    if find_head(model).decoder.weight is not model.get_input_embeddings().weight:
        raise ModelError(f"{source}: {type(model).__name__} does not tie its decoder to the input embeddings; use another encoder")
    if reason := why_not_fused(model):
        raise ModelError(f"{source}: {reason}, so a head cannot be trained; use another encoder")
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key in missing and weight.dim() == 2 and weight.shape[0] == weight.shape[1]:
                weight.copy_(torch.eye(len(weight)))
    return model, tokenizer


def token_counts(model: PreTrainedModel, tokenizer: Any, texts: Sequence[str], max_length: int) -> Tensor:
    """How often each token is in the texts, plus one, (vocabulary,)."""
    ids = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    vocabulary = find_head(model).decoder.weight.shape[0]
    return 1 + torch.bincount(torch.tensor(list(chain.from_iterable(ids)), dtype=torch.long), minlength=vocabulary).float()


@torch.no_grad()
def start_biases(model: PreTrainedModel, counts: Tensor) -> None:
    """Set the decoder's bias to the logarithm of each token's count, less the mean, which a head would learn first."""
    frequency = counts.log()
    for bias in find_head(model).biases:
        bias.copy_((frequency - frequency.mean()).reshape(bias.shape))
