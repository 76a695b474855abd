"""Seismic: an approximate index in memory for large corpora that do not change (Bruch et al., arXiv 2404.18812).

It drops most of a term's postings, so it may miss documents, or return fewer than k. Its recall is measured when it is built
and stands beside every result. ``pip install pyseismic-lsr`` has wheels for Linux on x86-64 and a few versions of Python.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anysplade.errors import OptionError
from anysplade.search.documents import check_vector
from anysplade.search.store import Found, Store

Vector = tuple[np.ndarray, np.ndarray]  # terms and weights, (active dims,) each


@dataclass(frozen=True)
class Approximate:
    """Positions and scores of float16 weights, best first, and the share of the exact k best that such answers hold."""

    found: Found
    recall: float  # measured on the queries that the engine was built with, at their k
    approximate: bool = True


class SeismicEngine:
    """Made from a store as it is; documents that are changed there later are not changed here."""

    def __init__(
        self,
        store: Store,
        queries: Sequence[Vector],
        *,
        k: int = 10,
        postings: int = 3500,
        query_cut: int = 24,
        heap_factor: float = 0.7,
    ) -> None:
        """Build it, and measure its recall against the exact product.

        Args:
            queries: like those that will be asked, to measure with; a few hundred.
            k: at which recall is measured.
            postings: kept of each term, at most on average; more find more.
            query_cut: terms of a query that are looked at, the heaviest.
            heap_factor: below 1 searches more, above it less.

        Raises:
            OptionError: no queries to measure with, or an empty store.
        """
        import seismic

        if not queries or not len(store):
            raise OptionError(
                f"{len(store)} documents and {len(queries)} queries: Seismic needs some of both, to measure its recall"
            )
        self.vocabulary, self.query_cut, self.heap_factor = store.vocabulary, query_cut, heap_factor
        self._string = seismic.get_seismic_string()
        dataset = seismic.SeismicDataset()
        for position, document in store.items():
            if len(document.terms):  # of an empty row it makes nothing
                dataset.add_document(str(position), document.terms.astype(self._string), document.weights)
        self._index: Any = seismic.SeismicIndex.build_from_dataset(dataset, n_postings=postings)
        shares = []
        for terms, weights in queries:
            exact = store.search(terms, weights, k, exact=True)
            if exact:
                bound = exact[-1][1] * (1 - 1e-3)  # float16 weights: of equal scores any will do
                shares.append(sum(score >= bound for _, score in self._search(terms, weights, k)) / len(exact))
        self.recall = float(np.mean(shares)) if shares else 1.0

    def search(self, terms: np.ndarray, weights: np.ndarray, k: int) -> Approximate:
        """Up to k documents; see ``Approximate``.

        Raises:
            DataError: a vector that is none.
        """
        terms, weights = check_vector("the query", terms, weights, self.vocabulary)
        return Approximate(self._search(terms, weights, k) if len(terms) else [], self.recall)

    def _search(self, terms: np.ndarray, weights: np.ndarray, k: int) -> Found:
        rows = self._index.search("", terms.astype(self._string), weights, k, self.query_cut, self.heap_factor)
        return sorted(((int(row[2]), float(row[1])) for row in rows), key=lambda hit: (-hit[1], hit[0]))
