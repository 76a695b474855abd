"""What goes into an index and what comes out of it, whatever engine holds it."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from anysplade.datasets import Document


class Encoded(NamedTuple):
    """A document with its vector: term ids rising, each once, weights finite and above 0."""

    id: str
    document: Document
    terms: np.ndarray  # (active dims,) int32
    weights: np.ndarray  # (active dims,) float32


@dataclass(frozen=True)
class TermMatch:
    """A term that query and document share; ``product`` is its part of the score."""

    term: str
    query_weight: float
    document_weight: float
    product: float


@dataclass(frozen=True)
class Hit:
    id: str
    score: float
    title: str
    text: str
    metadata: dict[str, Any] | None = None
    terms: list[TermMatch] | None = None  # with explain: largest product first; they sum to the score

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}
