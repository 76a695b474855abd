"""The hits of an index in the order of a cross-encoder, which is opened on first use and needs the extra ``train``."""

from dataclasses import replace
from pathlib import Path

from anysplade._common.extras import extra
from anysplade.data.corpus import Document
from anysplade.errors import OptionError
from anysplade.search.hits import Hits, Part, check_count


class Rescorer:
    """An open cross-encoder."""

    def __init__(self, model: str) -> None:
        """Open a folder or hub id; raises ModelError if it is no cross-encoder with one output."""
        with extra("train"):
            from anysplade.search.reranking import open_reranker

        self.model = model
        self._encoder = open_reranker(model)

    def rescore(self, query: str, hits: Hits, k: int) -> Hits:
        """The k hits of the highest logits, as ``rerank`` orders them; ``parts`` has their earlier rank and score as ``search``."""
        from anysplade.search.reranking import rerank

        known = {hit.id: (rank, hit) for rank, hit in enumerate(hits, 1)}
        texts = [(hit.id, Document(hit.title, hit.text).full_text) for hit in hits]
        found = Hits(note=hits.note)
        for id_, score in rerank(self._encoder, query, texts, max(1, len(texts)))[:k]:
            rank, hit = known[id_]
            found.append(replace(hit, score=score, parts=(hit.parts or {}) | {"search": Part(rank, hit.score)}))
        return found


class Rescoring:
    """The part of an index that opens the cross-encoder of its searches."""

    _rescorer: Rescorer | None = None

    def _open_rescorer(self, rerank: str | Path | Rescorer) -> Rescorer:
        """A cross-encoder by its name, which stays open for the next search."""
        if isinstance(rerank, Rescorer):
            return rerank
        if self._rescorer is None or self._rescorer.model != str(rerank):
            self._rescorer = Rescorer(str(rerank))
        return self._rescorer


def check_depth(k: int, depth: object) -> int:
    """``rerank_depth`` as an int; raises OptionError unless it is a whole number of at least k."""
    count = check_count("rerank_depth", depth)
    if count < k:
        raise OptionError(f"`rerank_depth` is {count}: it is at least `k`, {k}, so that all hits have scores of one kind")
    return count
