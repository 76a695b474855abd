"""BM25 as in Lucene (k1 0.9, b 0.4), with English stop words and Porter's stemmer, by bm25s.

Text in Korean, or in a script without spaces between words, becomes overlapping pairs of characters, as in Lucene's CJK analyzer.
"""

import logging
import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from anysplade._common.extras import extra
from anysplade.data.scripts import HANGUL, UNSPACED

with extra("evaluation"):
    import bm25s
    import Stemmer

bm25s.logger.setLevel(logging.ERROR)  # importing bm25s sets DEBUG

_UNSPACED = UNSPACED + HANGUL
_CHARACTER = rf"[{_UNSPACED}](?<=\w)(?:[{_UNSPACED}](?<!\w))*"  # a letter with its marks, which are not in \w
_CHARACTERS = re.compile(_CHARACTER)
_RUN = re.compile(rf"{_CHARACTER}(?:\u200b?{_CHARACTER})*")  # a few texts separate words by spaces of zero width
# Combining marks, as in Hindi, Tamil or decomposed Latin, belong to the letter before them, but are not in \w.
_MARKS = "".join(mark for mark in map(chr, range(0x300, 0x20000)) if unicodedata.category(mark) in ("Mn", "Mc"))
_TOKEN = rf"(?u)[{_UNSPACED}]+|(?:\w[{_MARKS}]*){{2,}}"  # the second half is the default of bm25s (two letters), with marks


class BM25:
    """An index of texts in memory, which are identified by their positions."""

    def __init__(self, texts: Sequence[str], stemmed: bool = True) -> None:
        self._stemmer = Stemmer.Stemmer("porter") if stemmed else None
        self._count = len(texts)
        self._retriever = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
        tokens = self._tokens(texts)
        self._empty = not any(len(ids) for ids in tokens.ids)  # bm25s cannot build an index without terms
        if not self._empty:
            self._retriever.index(tokens, show_progress=False)

    def _tokens(self, texts: Sequence[str]) -> Any:
        return bm25s.tokenize(
            [_RUN.sub(_in_pairs, unicodedata.normalize("NFC", text)) for text in texts],
            token_pattern=_TOKEN,
            stopwords="english",
            stemmer=self._stemmer,
            show_progress=False,
        )

    def top(self, queries: Sequence[str], k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each query the positions of up to ``k`` texts with scores above 0, and the scores, the highest first."""
        if self._empty or not queries:
            return [(np.zeros(0, np.int64), np.zeros(0)) for _ in queries]
        found, scores = self._retriever.retrieve(self._tokens(queries), k=min(k, self._count), show_progress=False)
        return [(row[values > 0], values[values > 0]) for row, values in zip(found, scores, strict=True)]

    def score(self, query: str, documents: np.ndarray) -> np.ndarray:
        """The scores of the texts at some positions, (positions,)."""
        ids = self._tokens([query])
        terms = {number: term for term, number in ids.vocab.items()}
        tokens = [terms[number] for number in ids.ids[0]]
        if self._empty or not tokens:
            return np.zeros(len(documents))
        return self._retriever.get_scores(tokens)[documents]


def _in_pairs(run: re.Match[str]) -> str:
    """Overlapping pairs of characters, separated by spaces; a single character is a token too."""
    characters = _CHARACTERS.findall(unicodedata.normalize("NFKC", run[0]))  # NFKC turns half width into full width
    return f" {' '.join(map(''.join, pairwise(characters))) or characters[0]} "
