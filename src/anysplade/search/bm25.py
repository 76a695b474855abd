"""BM25 as in Lucene (k1 0.9, b 0.4), by bm25s."""

import logging
from collections.abc import Sequence

import numpy as np

from anysplade._common.extras import extra
from anysplade.search.analysis import Analyzer
from anysplade.search.languages import AUTO, NONE, detect_language, language_name

with extra("evaluation"):
    import bm25s

logger = logging.getLogger(__name__)

K1, B = 0.9, 0.4  # of Lucene's formula


class BM25:
    """An index of texts in memory, which are identified by their positions.

    ``language`` chooses stemmer and stop words: a name or code, "none" for neither, or "auto" for the language of the texts; see
    ``language_name``. The attribute of that name is the language used.
    """

    def __init__(self, texts: Sequence[str], stemmed: bool = True, language: str = AUTO) -> None:
        self.language = language_of(texts, language)
        self._analyzer = Analyzer(self.language, stemmed)
        self._count = len(texts)
        self._retriever = bm25s.BM25(method="lucene", k1=K1, b=B)
        tokens = self._analyzer.tokens(texts)
        self._empty = not any(len(ids) for ids in tokens.ids)  # bm25s cannot build an index without terms
        if not self._empty:
            self._retriever.index(tokens, show_progress=False)

    def top(self, queries: Sequence[str], k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each query the positions of up to ``k`` texts with scores above 0, and the scores, the highest first."""
        if self._empty or not queries:
            return [(np.zeros(0, np.int64), np.zeros(0)) for _ in queries]
        found, scores = self._retriever.retrieve(self._analyzer.tokens(queries), k=min(k, self._count), show_progress=False)
        return [(row[values > 0], values[values > 0]) for row, values in zip(found, scores, strict=True)]

    def score(self, query: str, documents: np.ndarray) -> np.ndarray:
        """The scores of the texts at some positions, (positions,)."""
        ids = self._analyzer.tokens([query])
        terms = {number: term for term, number in ids.vocab.items()}
        tokens = [terms[number] for number in ids.ids[0]]
        if self._empty or not tokens:
            return np.zeros(len(documents))
        return self._retriever.get_scores(tokens)[documents]


def language_of(texts: Sequence[str], language: str) -> str:
    """The name of a language, for "auto" of that of the texts, which is logged unless it is English."""
    name = language_name(language)
    if name != AUTO:
        return name
    name = detect_language(texts)
    if name == NONE:
        logger.info("bm25: no stemmer and no stop words, because the language of the texts is unclear or has none; see `language`")
    elif name != "english":
        logger.info("bm25: stemmer and stop words of %s, the language of most texts; `language` chooses others", name)
    return name
