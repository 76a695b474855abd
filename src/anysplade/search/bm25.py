"""BM25 as in Lucene (k1 0.9, b 0.4), with the words of bm25s and its scores."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain, islice

import numpy as np
from scipy import sparse

from anysplade._common.row_file import RowFile
from anysplade.search.analysis import Analyzer
from anysplade.search.exact import top_rows
from anysplade.search.languages import AUTO, NONE, detect_language, language_name

logger = logging.getLogger(__name__)

K1, B = 0.9, 0.4  # of Lucene's formula

_TEXTS = 4096  # whose words are counted together
_WEIGHTS = 2**20  # weights that are computed together


class BM25:
    """An index of texts, which are identified by their positions.

    The texts are read in blocks. Their words, counted and then weighted, are a sparse matrix, (texts, words), which is mapped from
    files if it is large: in memory are the different words and a few bytes per text.

    ``language`` chooses stemmer and stop words: a name or code, "none" for neither, or "auto" for the language of the texts; see
    ``language_name``. The attribute of that name is the language used.
    """

    def __init__(self, texts: Sequence[str], stemmed: bool = True, language: str = AUTO) -> None:
        self.language = language_of(texts, language)
        self._analyzer = Analyzer(self.language, stemmed)
        self._columns: defaultdict[str, int] = defaultdict()
        self._columns.default_factory = self._columns.__len__
        rows, lengths = RowFile(), [np.zeros(0, np.int64)]
        iterator = iter(texts)
        while block := list(islice(iterator, _TEXTS)):
            counts = self._counts(block)
            lengths.append(np.bincount(np.repeat(np.arange(len(block)), np.diff(counts.indptr)), counts.data, len(block)))
            rows.append(counts)
        self._columns.default_factory = None
        self._weights = rows.matrix(len(self._columns))
        _weight(self._weights, np.concatenate(lengths))

    def top(self, queries: Sequence[str], k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each query the positions and scores of up to ``k`` texts with scores above 0, the highest first; ties by position."""
        return top_rows(self._weights, self._terms(queries), k, dtype=np.float32)

    @property
    def weights(self) -> sparse.csr_matrix:
        """The weights of the words in the texts, (texts, words): with ``query_counts``, the products sum to the scores."""
        return self._weights

    @property
    def words(self) -> list[str]:
        """The word of each column of ``weights``."""
        return list(self._columns)

    def query_counts(self, queries: Sequence[str]) -> sparse.csr_matrix:
        """How often each word is in each query, (queries, words)."""
        counts = self._terms(queries)
        counts.sum_duplicates()
        return counts

    def score(self, query: str, documents: np.ndarray) -> np.ndarray:
        """The scores of the texts at some positions, (positions,)."""
        terms = self._terms([query])
        return self._weights[documents].tocsc()[:, terms.indices] @ terms.data

    def _counts(self, texts: Sequence[str]) -> sparse.csr_matrix:
        """How often each word is in each text, (texts, words so far)."""
        tokens = self._analyzer.tokens(texts)
        names = {number: word for word, number in tokens.vocab.items()}
        ids = np.fromiter(chain.from_iterable(tokens.ids), np.int64)
        used, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
        order = np.argsort(first, kind="stable")  # words are numbered in the order of the texts
        columns = np.empty(len(used), np.int32)
        columns[order] = [self._columns[names[number]] for number in used[order].tolist()]
        indptr = np.cumsum([0, *map(len, tokens.ids)])
        shape = len(texts), len(self._columns)
        counts = sparse.csr_matrix((np.ones(len(ids), np.float32), columns[inverse], indptr), shape=shape)
        counts.sum_duplicates()
        return counts

    def _terms(self, queries: Sequence[str]) -> sparse.csr_matrix:
        """The known words of queries, (queries, words), in their order; a word can occur twice."""
        tokens = self._analyzer.tokens(queries)
        column = {number: self._columns[word] for word, number in tokens.vocab.items() if word in self._columns}
        known = [[column[number] for number in ids if number in column] for ids in tokens.ids]
        indptr = np.cumsum([0, *map(len, known)])
        indices = np.fromiter(chain.from_iterable(known), np.int32)
        shape = len(known), len(self._columns)
        return sparse.csr_matrix((np.ones(len(indices), np.float32), indices, indptr), shape=shape)


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


def _weight(counts: sparse.csr_matrix, lengths: np.ndarray) -> None:
    """Replace the counts of a matrix, (texts, words), by the scores of the words, as bm25s computes them.

    Lucene's ``log(1 + (N - n + 0.5) / (n + 0.5)) tf / (tf + k1 (1 - b + b length / mean length))``, with the logarithm and the
    result in float32.
    """
    texts, width = counts.shape
    found_in = np.zeros(width, np.int64)
    for _, span in _spans(counts.indptr):
        found_in += np.bincount(counts.indices[span], minlength=width)
    idf = np.log(1 + (texts - found_in + 0.5) / (found_in + 0.5)).astype(np.float32).astype(np.float64)
    mean = lengths.mean() if texts else 0.0
    for rows, span in _spans(counts.indptr):
        if span.stop > span.start:
            saturation = np.repeat(K1 * ((1 - B) + B * lengths[rows] / mean), np.diff(counts.indptr[rows.start : rows.stop + 1]))
            frequency = counts.data[span]
            counts.data[span] = idf[counts.indices[span]] * (frequency / (saturation + frequency))


def _spans(indptr: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """The rows and nonzeros of blocks of a CSR matrix."""
    start = 0
    while start < len(indptr) - 1:
        end = max(start + 1, int(np.searchsorted(indptr, indptr[start] + _WEIGHTS, "right")) - 1)
        yield slice(start, end), slice(int(indptr[start]), int(indptr[end]))
        start = end
