"""Dense embedding models of sentence-transformers, which teach sparse ones and are compared with them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import nn

from anysplade._common.parts import encode_in_parts
from anysplade._common.progress import bar_within
from anysplade.data.text import replace_surrogates
from anysplade.errors import ModelError
from anysplade.model.checkpoints import check_tokens
from anysplade.model.modules import cut_within, transformer_modules
from anysplade.model.options import Role
from anysplade.model.saved import first_line, saved_kind

_PART = 1024  # texts per call of the model and per stored file


def is_dense(source: str) -> bool:
    """Whether a model's folder or hub id was saved as a dense model of sentence-transformers."""
    return saved_kind(source) == "SentenceTransformer"


def open_dense(source: str, max_length: int | None = None) -> SentenceTransformer:
    """Open a dense model in float32; raises ModelError unless its score is a cosine or a dot product. See ``cut_reading``."""
    try:
        model = SentenceTransformer(source)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(f"{source}: cannot be loaded as a dense model: {first_line(error)}") from error
    if model.similarity_fn_name not in ("cosine", "dot"):
        raise ModelError(f"{source}: scores by {model.similarity_fn_name}; give a model whose score is a cosine or a dot product")
    cut_reading(model, max_length, source)
    return model.eval().float()


def cut_reading(model: nn.Module, max_length: int | None, source: str) -> None:
    """``cut_within`` for a dense model or cross-encoder, up to the length that was saved with it.

    Raises ModelError if a tokenizer has added tokens without embeddings. Static embeddings read every text whole.
    """
    for module in transformer_modules(model):
        tokenizer: Any = module.tokenizer
        check_tokens(tokenizer, module.model, source)
    cut_within(model, max_length, lengthen=False)


def encode_dense(
    model: SentenceTransformer,
    texts: Sequence[str],
    role: Role,
    *,
    precision: str = "float32",
    batch_size: int = 32,
    cache: Path | None = None,
    progress: bool = False,
    what: str | None = None,
    shown: Any = None,
) -> np.ndarray:
    """Vectors whose dot products are the model's scores: float32, (texts, width), in the order of the texts.

    Raises ModelError for NaN or infinity in a vector. The model adds the prompt of the role.

    Args:
        cache: a folder where the vectors of these texts by this model are stored; stored ones are not encoded again.
        what: label of the progress.
        shown: a ``bar`` to update, instead of showing one.
    """
    encode = model.encode_query if role == "query" else model.encode_document

    def encode_batch(batch: list[str]) -> Any:
        return encode(
            batch,
            batch_size=batch_size,
            normalize_embeddings=model.similarity_fn_name == "cosine",
            show_progress_bar=False,
        )

    def encode_part(_: int, part: Sequence[str]) -> np.ndarray:
        texts = [replace_surrogates(text) for text in part]
        with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            vectors = in_batches(texts, list(map(len, texts)), batch_size, encode_batch, shown)
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            raise ModelError(f"the model gives NaN or infinity for the {role} {part[int(finite.argmin())][:60]!r}")
        return vectors

    with bar_within(shown, what or f"encoding {role} texts", "text", len(texts), progress) as shown:
        parts = list(encode_in_parts(texts, _PART, encode_part, cache, ".npy", shown))
    return np.concatenate(parts) if parts else np.zeros((0, model.get_embedding_dimension() or 0), np.float32)


def in_batches(
    items: Sequence[Any], lengths: Sequence[int], size: int, encode: Callable[[list[Any]], Any], shown: Any
) -> np.ndarray:
    """Encode items batch by batch, the longest first; returns float32 rows or numbers in the order of the items."""
    order = np.argsort([-length for length in lengths], kind="stable")
    rows = []
    for start in range(0, len(items), size):
        batch = [items[i] for i in order[start : start + size]]
        rows.append(np.asarray(encode(batch), dtype=np.float32))
        shown.update(len(batch))
    return np.concatenate(rows)[np.argsort(order)]
