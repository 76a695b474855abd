"""The modules of a sparse encoder: which one reads a text and up to which length, and which MLM head defines the terms."""

from collections.abc import Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder, SparseStaticEmbedding, SpladePooling
from torch import nn
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import LARGE_INTEGER

from anysplade.errors import ModelError, OptionError
from anysplade.model import vocabulary
from anysplade.model.checkpoints import check_length, usable_positions
from anysplade.model.options import Role

Encoder = TypeVar("Encoder", bound=nn.Module)  # any model of sentence-transformers

# Most tokens that a trained backbone reads, unless it was trained on more: 8,192 would make every index at least eight times as
# expensive.
_LONGEST = 512


def splade_modules(encoder: SparseEncoder) -> tuple[Any, Any]:
    """The first and the last module that encode documents; with one MLM for both roles, they encode queries too."""
    first: Any = encoder[0]
    modules: Any = first.sub_modules["document"] if isinstance(first, Router) else encoder
    return modules[0], modules[-1]


def masked_lm(encoder: SparseEncoder) -> PreTrainedModel:
    """The masked LM inside a SPLADE encoder; raises ModelError for other encoders."""
    first = splade_modules(encoder)[0]
    if not isinstance(first, Transformer) or first.transformer_task != "fill-mask":
        modules = ", ".join(type(module).__name__ for module in encoder.children())
        raise ModelError(f"a SparseEncoder of another kind ({modules}): only SPLADE has an MLM head")
    return first.model


def is_splade(encoder: SparseEncoder) -> bool:
    """Whether documents go through an MLM head, so that each dimension is a term of its vocabulary."""
    first, last = splade_modules(encoder)
    return isinstance(first, Transformer) and first.transformer_task == "fill-mask" and isinstance(last, SpladePooling)


def is_routed(encoder: SparseEncoder) -> bool:
    """Whether queries and documents go through different modules."""
    return isinstance(encoder[0], Router)


def has_static_queries(encoder: SparseEncoder) -> bool:
    """Whether queries are encoded without a model, by one weight per token (inference-free)."""
    router: Any = encoder[0]
    return is_routed(encoder) and isinstance(router.sub_modules["query"][-1], SparseStaticEmbedding)


def transformer_modules(encoder: nn.Module) -> list[Transformer]:
    """All transformers of a model of sentence-transformers, for both roles."""
    return [module for module in encoder.modules() if isinstance(module, Transformer)]


def reader(encoder: SparseEncoder | SentenceTransformer, role: Role) -> Transformer | SparseStaticEmbedding | None:
    """The module that tokenizes and truncates the texts of a role; None if it is of another kind."""
    module: Any = encoder[0]
    if isinstance(module, Router):
        module = next(iter(module.sub_modules[role].children())) if role in module.sub_modules else None
    return module if isinstance(module, Transformer | SparseStaticEmbedding) else None


# -------------------------------------------------------------------------------------- lengths


def cut_at(encoder: SparseEncoder, max_length: int) -> None:
    """Truncate every text to ``max_length`` tokens; raises OptionError below 3 or above the model's positions."""
    if max_length < 3:
        raise OptionError(f"max length is {max_length}: a text needs at least 3 tokens, two of them special")
    for module in transformer_modules(encoder):
        check_length(module.model, max_length)
        module.max_seq_length = max_length


def cut_within(encoder: Encoder, max_length: int | None, *, lengthen: bool = True) -> Encoder:
    """Truncate texts to ``max_length`` tokens (None: as before; longer only with ``lengthen``), at most the model's positions."""
    for module in transformer_modules(encoder):
        limits = [max_length, usable_positions(module.model)]
        if max_length is None or not lengthen:
            limits.append(module.max_seq_length)
        module.max_seq_length = min(filter(None, limits), default=None)
    return encoder


def cut_in_training(encoder: SparseEncoder, max_length: int | None, saved: bool) -> list[int]:
    """``cut_within`` for a training; returns the length of each transformer after the training, for ``set_lengths``.

    That is the length before, at most 512 unless the encoder was a ``saved`` one, and at least the length in training.
    """
    before = transformer_lengths(encoder)
    cut_within(encoder, max_length)
    most = LARGE_INTEGER if saved else _LONGEST
    return [
        max(min(own, most), module.max_seq_length or 0) for own, module in zip(before, transformer_modules(encoder), strict=True)
    ]


def set_lengths(encoder: SparseEncoder, lengths: Sequence[int]) -> list[int]:
    """Truncate texts to one length for each transformer; returns the lengths before."""
    before = transformer_lengths(encoder)
    for module, length in zip(transformer_modules(encoder), lengths, strict=True):
        module.max_seq_length = length
    return before


def transformer_lengths(encoder: nn.Module) -> list[int]:
    """The length to which each transformer truncates texts."""
    return [module.max_seq_length or LARGE_INTEGER for module in transformer_modules(encoder)]


# ---------------------------------------------------------------------------------------- terms

_term_names: WeakKeyDictionary[SparseEncoder, list[str]] = WeakKeyDictionary()


def term_names(encoder: SparseEncoder) -> list[str]:
    """The name of each term, (vocabulary,) by id, as ``vocabulary.term_names`` defines it. Computed once per encoder.

    Slow tokenizers do not tell how they mark words, so their tokens are the names. The terms of an autoencoder are numbered.
    """
    if encoder not in _term_names:
        size, tokenizer = encoder.get_embedding_dimension() or 0, encoder.tokenizer
        if isinstance(encoder[-1], SparseAutoEncoder):
            names = vocabulary.name_terms([None] * size)
        elif tokenizer.is_fast:
            names = vocabulary.term_names(tokenizer.backend_tokenizer, size)
        else:
            ids = {id_: token for token, id_ in tokenizer.get_vocab().items()}
            names = vocabulary.name_terms([ids.get(term) for term in range(size)])
        _term_names[encoder] = names
    return _term_names[encoder]
