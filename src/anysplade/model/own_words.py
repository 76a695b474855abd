"""Own words kept: how much of a text's own words a sparse vector still has.

A word piece of a text is *own* to it, and *kept* if it is active in the text's vector. Own words kept is the share of own pieces
that are kept, over all texts of a role, each weighted by its idf:

    sum over texts and their own pieces of idf(piece) [piece is active] / sum over texts and their own pieces of idf(piece)

A piece counts once per text, as far as the model reads it. The idf is Lucene's, log(1 + (N - n + 0.5) / (n + 0.5)) for a piece in n
of N documents, for queries too. Three kinds of pieces do not count: special tokens, the pieces of the role's prompt, and terms that
are switched off. Both sums are over terms of two counts, so that texts can be counted in parts, without keeping any.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from scipy import sparse
from sentence_transformers import SparseEncoder

from anysplade.model.head import find_head, live_terms
from anysplade.model.modules import is_splade, masked_lm, reader
from anysplade.model.options import Role
from anysplade.model.runtimes import runtime_of
from anysplade.model.tokenizing import TOKENIZING, Tokens, prompt_of


class PieceCounts:
    """In how many texts of a role each piece is own, and in how many of these it is kept."""

    def __init__(self, vocabulary: int) -> None:
        self.texts = 0
        self.own = np.zeros(vocabulary, np.int64)
        self.kept = np.zeros(vocabulary, np.int64)

    def add(self, vectors: sparse.csr_matrix, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Count texts, of which all tokens are in ``ids``, (tokens,), one text after the other."""
        own = _own_pieces(ids, lengths, len(self.own))
        self.texts += len(lengths)
        for counts, rows in ((self.own, own), (self.kept, own.multiply(vectors > 0).tocsr())):
            counts += np.bincount(rows.indices, minlength=len(counts))

    def add_tokens(self, vectors: sparse.csr_matrix, tokens: Tokens) -> None:
        """``add`` for texts as an encoder reads them."""
        self.add(vectors, *tokens.flat())

    def merge(self, other: "PieceCounts") -> None:
        """Add the counts of other texts."""
        self.texts += other.texts
        self.own += other.own
        self.kept += other.kept

    def share(self, idf: np.ndarray) -> float | None:
        """Own words kept; None if no own piece has a weight above 0. ``idf`` is (vocabulary,)."""
        total = float(self.own @ idf)
        return float(self.kept @ idf) / total if total > 0 else None


def _own_pieces(ids: np.ndarray, lengths: np.ndarray, vocabulary: int) -> sparse.csr_matrix:
    """1 for each piece of each text, (texts, vocabulary)."""
    known = ids < vocabulary  # a tokenizer can have more tokens than the head has rows
    starts = np.concatenate([[0], np.cumsum(known)])[np.concatenate([[0], np.cumsum(lengths)])]
    own = sparse.csr_matrix((np.ones(starts[-1], np.int8), ids[known], starts), shape=(len(lengths), vocabulary))
    own.sum_duplicates()
    own.data[:] = 1
    return own


def document_frequency(ids: np.ndarray, lengths: np.ndarray, vocabulary: int) -> np.ndarray:
    """In how many texts each piece is, (vocabulary,); the arguments are those of ``PieceCounts.add``."""
    return np.bincount(_own_pieces(ids, lengths, vocabulary).indices, minlength=vocabulary)


def own_words(vectors: sparse.csr_matrix, ids: Sequence[Sequence[int]], idf: np.ndarray) -> float | None:
    """Own words kept by vectors of texts; the module's docstring defines it.

    Args:
        vectors: (texts, vocabulary).
        ids: the token ids of each text.
        idf: weight of each piece, (vocabulary,); 0 for pieces that do not count.

    Returns:
        From 0 to 1; None if no text has a piece with a weight above 0.
    """
    counts = PieceCounts(vectors.shape[1])
    lengths = np.array([len(text) for text in ids], np.int64)
    counts.add(vectors, np.fromiter(chain.from_iterable(ids), np.int64, int(lengths.sum())), lengths)
    return counts.share(idf)


def lucene_idf(frequency: np.ndarray, documents: int) -> np.ndarray:
    """The inverse document frequency of terms that are in ``frequency`` documents each, as in Lucene's BM25."""
    return np.asarray(np.log1p((documents - frequency + 0.5) / (frequency + 0.5)))


def counts_as_own(encoder: SparseEncoder, role: Role) -> np.ndarray | None:
    """Which pieces count in texts of a role, (vocabulary,) of bool.

    None if the terms of the encoder are not its tokens, or if it was loaded for another runtime than torch, whose head is not read.
    """
    module: Any = reader(encoder, role)
    if not is_splade(encoder) or module is None or runtime_of(encoder) != "torch":
        return None
    live = live_terms(masked_lm(encoder))
    # Not the encoder's own number of dimensions, which for a stock encoder around a backbone is the width of its layers.
    counts = np.full(len(find_head(masked_lm(encoder)).decoder.weight), live is None)
    if live is not None:
        counts[live.cpu().numpy()] = True
    tokenizer = module.tokenizer
    with TOKENIZING:
        prompt = tokenizer(prompt_of(encoder, role) or "", add_special_tokens=False)["input_ids"]
    left_out = np.array([*tokenizer.all_special_ids, *prompt], np.int64)
    counts[left_out[left_out < len(counts)]] = False
    return counts
