"""Teachers: dense models of sentence-transformers, sparse encoders and cross-encoders.

A dense or sparse teacher encodes each text to a vector, and a score is a dot product. A cross-encoder reads a query and a document
together, so it scores pairs.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from scipy import sparse
from sentence_transformers import SparseEncoder

from anysplade._common.logs import at_least
from anysplade.errors import ModelError
from anysplade.model.calibration import is_sparse
from anysplade.model.cross_encoders import open_cross_encoder, rate_pairs
from anysplade.model.dense import encode_dense, open_dense
from anysplade.model.encoder import build_encoder, is_saved_encoder, open_encoder
from anysplade.model.encoding import encode
from anysplade.model.modules import cut_within
from anysplade.model.options import Role
from anysplade.model.saved import fingerprint, resolve_model, saved_json, saved_kind

Kind = Literal["dense", "sparse", "cross-encoder"]
Rows: TypeAlias = Any  # one vector per row: a numpy array or a scipy CSR matrix


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher model."""

    name: str  # folder or hub id, as given
    kind: Kind
    model: Any  # SentenceTransformer, SparseEncoder or CrossEncoder
    cosine: bool  # whether scores are cosines; otherwise dot products or logits
    precision: str  # of the matrix products: float32 or bfloat16
    batch_size: int  # texts, or pairs of texts, per forward pass
    key: str  # SHA-256 of everything that the scores depend on
    batch_tokens: int | None = None  # tokens per forward pass of a sparse encoder; see ``encode``

    @property
    def temperature(self) -> float:
        """Default divisor of the scores; cosines are close together and need a small one."""
        return 0.05 if self.cosine else 1.0

    def encode(self, texts: Sequence[str], role: Role, progress: bool = False, shown: Any = None) -> Rows:
        """Vectors whose dot products are the scores, (texts, width): float16 from a dense model, float32 from a sparse one.

        ``shown`` is a ``bar`` to update, instead of showing one.
        """
        if self.kind == "sparse":
            rows: sparse.csr_matrix = encode(
                self.model, texts, role, batch_tokens=self.batch_tokens, progress=progress, shown=shown
            )
            if self.cosine:
                norms = np.sqrt(np.asarray(rows.multiply(rows).sum(axis=1)).ravel())
                rows = sparse.diags_array(1 / np.maximum(norms, 1e-12)).tocsr() @ rows
            return sparse.csr_matrix(rows, dtype=np.float32)
        options: dict[str, Any] = {"precision": self.precision, "batch_size": self.batch_size, "progress": progress}
        options |= {"what": f"encoding {role} texts with {self.name}", "shown": shown}
        with np.errstate(over="ignore"):
            vectors = encode_dense(self.model, texts, role, **options).astype(np.float16)
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            raise ModelError(f"{self.name}: gives a number above 65,504 for the {role} {texts[int(finite.argmin())][:60]!r}")
        return vectors

    def rate(self, pairs: Sequence[tuple[str, str]], shown: Any = None) -> np.ndarray:
        """A cross-encoder's raw logits for pairs of a query and a document, (pairs,), float32; ``shown`` is a ``bar`` to update."""
        options: dict[str, Any] = {"precision": self.precision, "batch_size": self.batch_size, "name": self.name}
        return rate_pairs(self.model, pairs, **options, shown=shown)


def teacher_kind(source: str) -> Kind:
    """What kind of teacher a model's folder or hub id contains, by its configuration."""
    kinds: dict[str | None, Kind] = {"SentenceTransformer": "dense", "SparseEncoder": "sparse", "CrossEncoder": "cross-encoder"}
    saved = saved_kind(source)
    if saved in kinds:
        return kinds[saved]
    architectures = (saved_json(source, "config.json") or {}).get("architectures") or [""]
    if architectures[0].endswith("ForSequenceClassification"):
        return "cross-encoder"
    if architectures[0].endswith("ForMaskedLM"):
        return "sparse"
    raise ModelError(
        f"{source}: cannot teach ({architectures[0] or 'no architecture in its config.json'}); give a dense model of "
        "sentence-transformers, a sparse encoder or a cross-encoder"
    )


def open_teacher(
    name: str,
    *,
    max_length: int | None = None,
    precision: str = "float32",
    batch_size: int = 32,
    batch_tokens: int | None = None,
) -> Teacher:
    """Load a teacher from a folder or the hub.

    Texts are truncated to ``max_length`` tokens, or the model's own limit if it is lower; ``batch_size`` is per forward pass,
    ``batch_tokens`` per forward pass of a sparse encoder.
    """
    source = resolve_model(name)
    kind = teacher_kind(source)
    model: Any
    if kind == "cross-encoder":
        model = open_cross_encoder(source, max_length)
    else:
        model = open_sparse(source, max_length) if kind == "sparse" else open_dense(source, max_length)
    cosine = kind != "cross-encoder" and model.similarity_fn_name == "cosine"
    decisive = [fingerprint(source) or source, kind, max_length, precision, cosine]
    key = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()
    return Teacher(name, kind, model, cosine, precision, batch_size, key, batch_tokens)


def without_advice() -> AbstractContextManager[None]:
    """Do not log why a head is not calibrated and how to change that, where there are no options for it."""
    return at_least(logging.WARNING, "anysplade.model.encoder", "anysplade.model.calibration")


def open_sparse(source: str, max_length: int | None = None) -> SparseEncoder:
    """Open a saved sparse encoder, or build one from the masked LM of a published SPLADE; ``max_length`` as in ``open_teacher``."""
    if is_saved_encoder(source):
        return cut_within(open_encoder(source), max_length)
    with without_advice():
        encoder, calibration = build_encoder(source)
    if not is_sparse(calibration):
        raise ModelError(f"{source}: a masked LM that was not trained to retrieve; give a dense model, a SPLADE or a cross-encoder")
    return cut_within(encoder, max_length)
