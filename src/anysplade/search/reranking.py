"""Re-score the first hits of a search with a cross-encoder, which reads the query and a document together."""

from dataclasses import replace
from pathlib import Path

from anysplade._common.extras import extra
from anysplade.data.corpus import Document
from anysplade.errors import OptionError
from anysplade.search.hits import Hits, Part, check_count


class Reranker:
    """A cross-encoder on this machine, in float32; opening it needs the extra ``train``."""

    def __init__(self, model: str) -> None:
        """Open a folder or hub id; raises ModelError if it is no cross-encoder."""
        with extra("train"):
            from anysplade.model.cross_encoder import open_cross_encoder

        self.model = model
        self._encoder = open_cross_encoder(model)

    def rerank(self, query: str, hits: Hits, k: int) -> Hits:
        """The k hits of the highest logits; each has its earlier rank and score in its ``parts`` as ``search``."""
        from anysplade.model.cross_encoder import rate_pairs

        pairs = [(query, Document(hit.title, hit.text).full_text) for hit in hits]
        scores = rate_pairs(self._encoder, self.model, pairs).tolist() if pairs else []
        found = [
            replace(hit, score=score, parts=(hit.parts or {}) | {"search": Part(rank, hit.score)})
            for rank, (hit, score) in enumerate(zip(hits, scores, strict=True), 1)
        ]
        return Hits(sorted(found, key=lambda hit: -hit.score)[:k], hits.note)


class Reranking:
    """The part of an index that opens the cross-encoder of its searches."""

    _reranker: Reranker | None = None

    def _open_reranker(self, rerank: str | Path | Reranker) -> Reranker:
        """A cross-encoder by its name, which stays open for the next search."""
        if isinstance(rerank, Reranker):
            return rerank
        if self._reranker is None or self._reranker.model != str(rerank):
            self._reranker = Reranker(str(rerank))
        return self._reranker


def check_depth(k: int, depth: object) -> int:
    """``rerank_depth`` as an int; raises OptionError unless it is a whole number of at least k."""
    count = check_count("rerank_depth", depth)
    if count < k:
        raise OptionError(f"`rerank_depth` is {count}: it is at least `k`, {k}, so that all hits have scores of one kind")
    return count
