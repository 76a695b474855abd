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
from anysplade.search.languages import WORD, stemmer, stop_words

with extra("search"):
    import bm25s

bm25s.logger.setLevel(logging.ERROR)  # importing bm25s sets DEBUG

_UNSPACED = UNSPACED + HANGUL
_CHARACTER = rf"[{_UNSPACED}](?<=\w)(?:[{_UNSPACED}](?<!\w))*"  # a letter with its marks, which are not in \w
_CHARACTERS = re.compile(_CHARACTER)
_RUN = re.compile(rf"{_CHARACTER}(?:\u200b?{_CHARACTER})*")  # a few texts separate words by spaces of zero width
_TOKEN = rf"(?u)[{_UNSPACED}]+|{WORD}"
_TURKISH = str.maketrans("Iİ", "ıi")  # its small letters


class Analyzer:
    """Stop words of the language are left out, and words are reduced to their stems.

    ``language`` is what ``languages.language_name`` gives, but not "auto". English has Porter's stemmer.
    """

    def __init__(self, language: str = "english", stemmed: bool = True) -> None:
        self._turkish = language == "turkish"
        self._stop_words = stop_words(language)
        self._stemmer = stemmer(language) if stemmed else None

    def tokens(self, texts: Sequence[str]) -> Any:
        """The stems of each text as ``bm25s.tokenize`` gives them: ``ids`` by text, and ``vocab``, the id of each stem."""
        return bm25s.tokenize(
            [_RUN.sub(_in_pairs, self._normalized(text)) for text in texts],
            token_pattern=_TOKEN,
            stopwords=self._stop_words,
            stemmer=self._stemmer,
            show_progress=False,
        )

    def _normalized(self, text: str) -> str:
        text = unicodedata.normalize("NFC", text)
        return text.translate(_TURKISH) if self._turkish else text


def _in_pairs(run: re.Match[str]) -> str:
    """Overlapping pairs of characters, separated by spaces; a single character is a token too."""
    characters = _CHARACTERS.findall(unicodedata.normalize("NFKC", run[0]))  # NFKC turns half width into full width
    return f" {' '.join(map(''.join, pairwise(characters))) or characters[0]} "
