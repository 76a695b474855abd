"""Fused pooling: a SPLADE encoder that pools its hidden states without building the (batch, length, vocabulary) logits.

``FusedEncoder.forward`` runs the masked LM without its decoder, then ``pooling.splade_pool``, which includes the decoder's product.
Its modules stay those of sentence-transformers, and so do saved files.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Router
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import Tensor, nn
from transformers import PreTrainedModel

from anysplade.model.head import find_head, live_terms, sample_logits
from anysplade.model.modules import masked_lm, splade_modules
from anysplade.model.pooling import splade_pool

logger = logging.getLogger(__name__)


class FusedEncoder(SparseEncoder):
    """A ``SparseEncoder`` with fused pooling, made by ``fuse_pooling``. Saving it writes a stock ``SparseEncoder``."""

    live: Tensor | None  # ids of the terms that are not switched off; None for all. A buffer, so that it moves with the model.

    def forward(self, input: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add ``sentence_embedding``, (batch, vocabulary), to the features of a batch of tokenized texts."""
        transformer, pooling = splade_modules(self)
        decoder = _decoder(transformer.model)
        if self._module_of(input, kwargs) is not transformer:
            return super().forward(input, **kwargs)  # queries that have their own modules
        hidden, mask = self._hidden_states(transformer, input)
        double_log = pooling.activation_function == "log1p_relu"
        input["sentence_embedding"] = splade_pool(
            hidden, decoder.weight, decoder.bias, mask, pooling.pooling_strategy, double_log, self.live
        )
        return input

    def _module_of(self, features: dict[str, Any], options: dict[str, Any]) -> Any:
        """The first module that a batch goes through."""
        first: Any = self[0]
        if not isinstance(first, Router):
            return first
        chosen = {name: options.get(name) or features.get(name) for name in ("task", "modality")}
        modules: Any = first.sub_modules[first._resolve_route(**chosen) or ""]
        return modules[0]

    def _hidden_states(self, transformer: Any, features: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The decoder's inputs, (batch, length, width), and the mask of tokens, (batch, length)."""
        with _without(_decoder(transformer.model)):
            hidden = transformer(features)["token_embeddings"]
        if "cu_seq_lens_q" not in features:
            return hidden, features["attention_mask"]
        return pad(hidden[0], features["cu_seq_lens_q"], features["max_length_q"])  # padding is cheap at this width


def pad(tokens: Tensor, starts: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Pad texts that stand one after another, without waiting for a GPU.

    Args:
        tokens: (tokens, width).
        starts: (batch + 1,), where each text starts, and the number of tokens.
        longest: number of tokens of the longest text.

    Returns:
        The tokens, (batch, longest, width), and their mask, (batch, longest).
    """
    texts, number = len(starts) - 1, torch.arange(len(tokens), dtype=starts.dtype, device=starts.device)
    text = torch.searchsorted(starts[1:], number, right=True)
    padded = tokens.new_zeros(texts * longest, tokens.shape[1]).index_copy(0, text * longest + number - starts[text], tokens)
    return padded.view(texts, longest, -1), torch.arange(longest, device=starts.device) < starts.diff().unsqueeze(1)


FusedEncoder.__name__ = SparseEncoder.__name__  # shown in messages, and written in the card of a saved model, which is stock


def fuse_pooling(encoder: SparseEncoder) -> bool:
    """Switch a SPLADE encoder to fused pooling, in place, for training and encoding; ``unfuse_pooling`` undoes it.

    Weights, configuration and saved files stay stock, and the masked LM called directly still gives logits. If the head is not one
    projection with its bias, nothing changes and the reason is logged.

    Returns:
        Whether the pooling is fused now.
    """
    pooling = splade_modules(encoder)[1]
    model = masked_lm(encoder)
    unfuse_pooling(encoder)
    if not isinstance(pooling, SpladePooling):
        reason: str | None = f"its last module is {type(pooling).__name__}"
    elif type(encoder) is not SparseEncoder:
        reason = f"{type(encoder).__name__} may have its own forward"
    else:
        reason = why_not_fused(model)
    if reason:
        logger.info("pooling is not fused, which is slower but gives the same result: %s", reason)
        return False
    decoder = _decoder(model)
    if pooling.embedding_dimension is None:  # the module's own forward would set it
        pooling.embedding_dimension = len(decoder.weight)
    decoder.__class__ = Decoder
    encoder.__class__ = FusedEncoder
    encoder.register_buffer("live", live_terms(model), persistent=False)
    return True


def unfuse_pooling(encoder: SparseEncoder) -> None:
    """Restore the forward of sentence-transformers."""
    if is_fused(encoder):
        encoder.__class__ = SparseEncoder
        del encoder.live


def is_fused(encoder: SparseEncoder) -> bool:
    """Whether an encoder has fused pooling."""
    return isinstance(encoder, FusedEncoder)


def why_not_fused(model: PreTrainedModel) -> str | None:
    """Why pooling cannot be fused, or None: it needs logits that are exactly ``hidden @ weight.T + bias``."""
    head, name = find_head(model), type(model).__name__
    if type(head.decoder).forward not in (nn.Linear.forward, Decoder.forward) or (head.decoder.bias is None and head.biases):
        return f"{name} adds a bias outside its decoder"
    if not _logits_are_the_decoders(model, head.decoder):
        return f"{name} changes its logits after the decoder"
    return None


def _logits_are_the_decoders(model: PreTrainedModel, decoder: nn.Module) -> bool:
    """Whether the logits are the decoder's output, to the last bit, so that the type of the weights does not matter."""
    seen: list[Tensor] = []
    hook = decoder.register_forward_hook(lambda module, inputs, output: seen.append(output.float()))
    try:
        logits = sample_logits(model)
    finally:
        hook.remove()
    return len(seen) == 1 and seen[0].numel() == logits.numel() and torch.equal(seen[0].reshape(logits.shape), logits)


# --------------------------------------------------------------------------------- hidden states


class Decoder(nn.Linear):
    """The decoder of a masked LM, which ``_without`` can leave out."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden if getattr(_left_out, "decoder", None) is self else super().forward(hidden)


_left_out = threading.local()  # .decoder returns its input in this thread


@contextmanager
def _without(decoder: nn.Linear) -> Iterator[None]:
    """Leave a decoder out in this thread only: others may need the model's logits at the same time."""
    before, _left_out.decoder = getattr(_left_out, "decoder", None), decoder
    try:
        yield
    finally:
        _left_out.decoder = before


def _decoder(model: PreTrainedModel) -> Decoder:
    decoder: Any = model.get_output_embeddings()
    return decoder


def hidden_states(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    """The hidden states before a masked LM's decoder, (batch, length, width), if ``why_not_fused`` returns None."""
    decoder = _decoder(model)
    decoder.__class__ = Decoder
    with _without(decoder):
        hidden: Tensor = model(**inputs).logits
        return hidden
