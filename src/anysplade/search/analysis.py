"""How BM25 splits texts into stems.

Text in Korean, or in a script without spaces between words, becomes overlapping pairs of characters, as in Lucene's CJK analyzer.
"""

import logging
import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

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


class Analyzer:
    """English stop words are left out, and words are reduced to their stems by Porter's stemmer."""

    def __init__(self, stemmed: bool = True) -> None:
        self._stemmer = Stemmer.Stemmer("porter") if stemmed else None

    def tokens(self, texts: Sequence[str]) -> Any:
        """The stems of each text as ``bm25s.tokenize`` gives them: ``ids`` by text, and ``vocab``, the id of each stem."""
        return bm25s.tokenize(
            [_RUN.sub(_in_pairs, unicodedata.normalize("NFC", text)) for text in texts],
            token_pattern=_TOKEN,
            stopwords="english",
            stemmer=self._stemmer,
            show_progress=False,
        )


def _in_pairs(run: re.Match[str]) -> str:
    """Overlapping pairs of characters, separated by spaces; a single character is a token too."""
    characters = _CHARACTERS.findall(unicodedata.normalize("NFKC", run[0]))  # NFKC turns half width into full width
    return f" {' '.join(map(''.join, pairwise(characters))) or characters[0]} "
