"""BM25 as Lucene does it (k1 0.9, b 0.4), with English stop words and Porter's stemmer, by bm25s."""

import logging
from collections.abc import Sequence
from typing import Any

import bm25s
import numpy as np
import Stemmer

bm25s.logger.setLevel(logging.ERROR)  # importing it sets DEBUG


class BM25:
    """An index over texts in memory; documents are known by their position."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._stemmer = Stemmer.Stemmer("porter")
        self._count = len(texts)
        self._retriever = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
        tokens = self._tokens(list(texts))
        # An index without a single term cannot be built, and would match nothing.
        self._empty = not any(len(ids) for ids in tokens.ids)
        if not self._empty:
            self._retriever.index(tokens, show_progress=False)

    def _tokens(self, texts: list[str]) -> Any:
        return bm25s.tokenize(texts, stopwords="english", stemmer=self._stemmer, show_progress=False)

    def top(self, queries: Sequence[str], k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each query up to ``k`` documents of a score above 0, and the scores, the highest first."""
        if self._empty or not queries:
            return [(np.zeros(0, np.int64), np.zeros(0)) for _ in queries]
        found, scores = self._retriever.retrieve(self._tokens(list(queries)), k=min(k, self._count), show_progress=False)
        return [(row[values > 0], values[values > 0]) for row, values in zip(found, scores, strict=True)]

    def score(self, query: str, documents: np.ndarray) -> np.ndarray:
        """Scores of some documents for a query."""
        if self._empty:
            return np.zeros(len(documents))
        ids = self._tokens([query])
        terms = [term for term, _ in sorted(ids.vocab.items(), key=lambda item: item[1])]
        tokens = [terms[i] for i in ids.ids[0]]
        if not tokens:
            return np.zeros(len(documents))
        return self._retriever.get_scores(tokens)[documents]
