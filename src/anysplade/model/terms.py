"""Show a sparse vector as words with weights; pieces of a word are joined."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import sparse

from anysplade._common.arguments import require
from anysplade._common.tables import Tabular
from anysplade.errors import OptionError
from anysplade.model.options import OPEN_ENCODER
from anysplade.model.vocabulary import join_pieces, split_words

if TYPE_CHECKING:
    from sentence_transformers import SparseEncoder
    from torch import Tensor


class WeightedTerm(NamedTuple):
    """A word of a sparse vector."""

    term: str  # a name in ``term_names``, or a word whose pieces are terms
    weight: float  # in the vector; for a joined word, the sum over its pieces
    ids: tuple[int, ...]  # of the term, or of the pieces


class Terms(list[WeightedTerm], Tabular):
    """The terms of a vector, the largest weight first: a list that is displayed as a table."""

    __repr__ = Tabular.__repr__

    def _rows(self) -> list[dict[str, Any]]:
        return [term._asdict() for term in self]


def terms(
    vector: "sparse.spmatrix | np.ndarray | Tensor", encoder: "SparseEncoder", text: str | None = None, k: int | None = None
) -> Terms:
    """The words of a sparse vector with their weights, the largest first.

    Args:
        vector: one row of ``encode``'s result, or the result of ``SparseEncoder.encode`` for one text, (vocabulary,) or
            (1, vocabulary).
        encoder: the encoder that made the vector.
        text: the text of the vector. With it, words that the tokenizer split are shown whole; a piece that occurs in several words
            counts for the first of them.
        k: maximum number of words; None for all.

    Raises:
        OptionError: the vector has another width than the encoder, or several rows.
    """
    from sentence_transformers import SparseEncoder  # here, for the search page joins words without torch

    from anysplade.model.encoding import ModelQueries
    from anysplade.model.modules import term_names

    require("encoder", encoder, SparseEncoder, OPEN_ENCODER)
    row = _one_row(vector)
    names = term_names(encoder)
    if row.shape[1] != len(names):
        raise OptionError(f"`vector` has {row.shape[1]:,} terms and the encoder {len(names):,}; give the encoder that made it")
    words = {} if text is None else split_words(text, ModelQueries(encoder).tokens(text), names)
    return join_terms(zip(row.indices.tolist(), row.data.tolist(), strict=True), names, words, k)


def join_terms(weights: Iterable[tuple[int, float]], names: Sequence[str], words: Mapping[int, str], k: int | None = None) -> Terms:
    """Name the terms of (id, weight) pairs, the largest weight first; terms that ``words`` maps to the same word are joined."""
    joined = join_pieces((words.get(term), names[term], weight, term) for term, weight in weights)
    return Terms(WeightedTerm(word, weight, tuple(ids)) for word, weight, ids in joined[:k])


def _one_row(vector: Any) -> sparse.csr_matrix:
    """The vector as a sparse row, (1, vocabulary), without stored zeros."""
    if hasattr(vector, "detach"):  # a tensor
        vector = vector.detach().cpu().to_dense().float().numpy()
    if not sparse.issparse(vector):
        vector = np.atleast_2d(np.asarray(vector, np.float32))
    row = sparse.csr_matrix(vector)
    if row.shape[0] != 1:
        raise OptionError(f"`vector` has {row.shape[0]:,} rows; give one of them, such as vectors[0]")
    row.eliminate_zeros()
    return row
