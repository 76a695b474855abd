"""Re-rank the documents that a search found, by a cross-encoder that reads the query together with each of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from anysplade.model.cross_encoders import open_cross_encoder, rate_pairs
from anysplade.model.saved import resolve_model
from anysplade.search.hits import check_count

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

DEPTH = 100  # documents per query that are re-ranked


def open_reranker(model: str, max_length: int | None = None) -> "CrossEncoder":
    """Open a cross-encoder from a folder or the hub; a query with a document is cut to ``max_length`` tokens, at most its own."""
    return open_cross_encoder(resolve_model(model), max_length)


def rerank(model: "str | CrossEncoder", query: str, hits: Sequence[tuple[str, str]], depth: int = DEPTH) -> list[tuple[str, float]]:
    """The first ``depth`` hits in the order of a cross-encoder's scores: ids and raw logits, the highest first.

    Equal scores keep the order of the hits. A pair costs one pass of the whole model, so the time grows with ``depth``.

    Args:
        model: folder or hub id, which is opened for this call, or what ``open_reranker`` returned.
        query: its text.
        hits: ids and texts of documents, the best first.
        depth: number of hits to read; later ones are left out.

    Raises:
        OptionError: ``depth`` is below 1.
        ModelError: the model is no cross-encoder with one output, or gives NaN.
    """
    depth = check_count("rerank_depth", depth)
    opened = open_reranker(model) if isinstance(model, str) else model
    read = list(hits[:depth])
    if not read:
        return []
    scores = rate_pairs(opened, [(query, text) for _, text in read]).tolist()
    return sorted(((id_, score) for (id_, _), score in zip(read, scores, strict=True)), key=lambda hit: -hit[1])
