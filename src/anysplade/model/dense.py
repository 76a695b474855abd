"""Dense embedding models of sentence-transformers, which teach sparse ones and are measured beside them."""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer

from anysplade._common.files import write_atomic
from anysplade._common.progress import bar
from anysplade.data.text import replace_surrogates
from anysplade.errors import ModelError
from anysplade.model.head import check_tokens, usable_positions
from anysplade.model.options import Role
from anysplade.model.saved import first_line, saved_kind

_PART = 1024  # texts that are encoded together, and kept in one file


def is_dense(source: str) -> bool:
    """Whether a model's folder or hub id was saved as a dense model of sentence-transformers."""
    return saved_kind(source) == "SentenceTransformer"


def open_dense(source: str, max_length: int | None = None) -> SentenceTransformer:
    """A dense model in float32.

    Args:
        max_length: tokens that a text is cut to, up to what the model reads.

    Raises:
        ModelError: it cannot be loaded, or scores by something else than a cosine or a dot product.
    """
    try:
        model = SentenceTransformer(source)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(f"{source}: cannot be loaded as a dense model: {first_line(error)}") from error
    if model.similarity_fn_name not in ("cosine", "dot"):
        raise ModelError(f"{source}: scores by {model.similarity_fn_name}; give a model whose score is a cosine or a dot product")
    cut_reading(model, max_length, source)
    return model.eval().float()


def cut_reading(model: Any, max_length: int | None, source: str) -> None:
    """Limit what a model of sentence-transformers reads; one with a static embedding reads any text whole.

    Raises:
        ModelError: its tokenizer has tokens that it has no embeddings for.
    """
    for module in model.modules():
        if isinstance(module, Transformer):
            check_tokens(module.tokenizer, module.model, source)
            limits = (module.max_seq_length, max_length, usable_positions(module.model))
            module.max_seq_length = min(filter(None, limits), default=None)


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
) -> np.ndarray:
    """Vectors whose dot products are the model's scores: float32, (texts, width), in their order.

    Args:
        texts: without the prompt of their role, which the model adds.
        precision: of the products, float32 or bfloat16.
        cache: a folder for these texts' vectors by this model; what is in it is not encoded again.
        progress: show progress.
        what: the words for it.

    Raises:
        ModelError: NaN or infinity in a vector.
    """
    of_role = model.encode_query if role == "query" else model.encode_document
    parts = []
    with bar(what or f"encoding {role} texts", "text", len(texts), progress) as shown:
        for start in range(0, len(texts), _PART):
            part = texts[start : start + _PART]
            kept = None if cache is None else cache / f"{start:012}.npy"
            vectors = None if kept is None else _read(kept)
            if vectors is None:
                with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                    vectors = of_role(
                        [replace_surrogates(text) for text in part],
                        batch_size=batch_size,
                        normalize_embeddings=model.similarity_fn_name == "cosine",
                        show_progress_bar=False,
                    )
                vectors = np.asarray(vectors, dtype=np.float32)
                whole = np.isfinite(vectors).all(axis=1)
                if not whole.all():
                    bad = part[int(whole.argmin())]
                    raise ModelError(f"the model gives NaN or infinity for the {role} {bad[:60]!r}")
                if kept is not None:
                    file = io.BytesIO()
                    np.save(file, vectors)
                    write_atomic(kept, file.getvalue())
            parts.append(vectors)
            shown.update(len(part))
    return np.concatenate(parts) if parts else np.zeros((0, model.get_embedding_dimension() or 0), np.float32)


def _read(path: Path) -> np.ndarray | None:
    with contextlib.suppress(OSError, ValueError, EOFError):  # absent or damaged: made again
        return np.asarray(np.load(path))
    return None
