"""The result of a search: hits, and the terms that explain their scores."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from anysplade._common.arguments import require
from anysplade._common.tables import Tabular
from anysplade.errors import OptionError
from anysplade.model.options import checked_option
from anysplade.model.queries import Queries
from anysplade.model.vocabulary import join_pieces, split_words


@dataclass(frozen=True)
class TermMatch:
    """A term that a query and a document share."""

    term: str  # its token, or ``[term:ID]``
    query_weight: float  # in the vector of the query
    document_weight: float  # in the vector of the document
    product: float  # of the two weights: the share of the term in the score
    lexical: bool = False  # a word of the query, matched by its stem as in BM25, not a term of the model


@dataclass(frozen=True)
class Part:
    """The place of a document in a ranking that was fused or re-ranked."""

    rank: int  # from 1
    score: float


class WordMatch(NamedTuple):
    """A shared word, as shown to a person."""

    word: str  # a term's name, a word of the query that the tokenizer split into terms, or "word" if matched by its stem
    terms: list[TermMatch]  # the term, or the shared terms of the word
    product: float  # the sum of the products of the terms


@dataclass(frozen=True, repr=False)
class Hit(Tabular):
    """A document that a search returned."""

    id: str  # of the document
    score: float  # dot product of the two vectors; the fused score with ``fuse``, the cross-encoder's with ``rerank``
    title: str  # of the document; empty without one
    text: str  # of the document
    metadata: dict[str, Any] | None = None  # of the document
    terms: list[TermMatch] | None = None  # with ``explain``: the largest product first; the products sum to the score
    parts: dict[str, Part] | None = None  # with ``fuse``: in "model", "bm25" or both; with ``rerank``: in "search", before it

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    def _rows(self) -> list[dict[str, Any]]:
        """One row without the metadata; each term is shown with its product."""
        terms = {} if self.terms is None else {"terms": " ".join(f"{match.term} {match.product:.2f}" for match in self.terms)}
        return [{"id": self.id, "score": self.score, "title": self.title, "text": self.text} | terms]


class Hits(list[Hit], Tabular):
    """The hits of a search, the best first: a list that is shown as a table."""

    def __init__(self, hits: Iterable[Hit] = (), note: str | None = None) -> None:
        super().__init__(hits)
        self.note = note  # without hits: the name or value of the filter that no document has

    __repr__ = Tabular.__repr__  # not that of list

    def _empty(self) -> str:
        return super()._empty() + (f" ({self.note})" if self.note else "")

    def _rows(self) -> list[dict[str, Any]]:
        return [{"rank": rank} | hit._rows()[0] for rank, hit in enumerate(self, 1)]


def check_query(query: object) -> None:
    """Raise OptionError unless the query is one text with a visible character."""
    require("query", query, str, "give one text; of several, search each by itself")
    if not str(query).strip():
        raise OptionError("the query is empty; give a text")


def check_count(name: str, value: object) -> int:
    """The option called ``name`` as an int; raises OptionError unless it is a whole number of at least 1."""
    count: int = checked_option(f"`{name}`", value, int)
    if count < 1:
        raise OptionError(f"`{name}` is {count}: it is at least 1")
    return count


def explain_score(
    names: Sequence[str],
    query: sparse.csr_matrix,
    terms: np.ndarray,
    weights: np.ndarray,
    words: Mapping[int, str] | None = None,
) -> list[TermMatch]:
    """The terms that a query, (1, vocabulary), and a document with these terms and weights share, the largest product first.

    ``words`` has the words of the query by the terms after the vocabulary, which are stems.
    """
    shared, in_query, in_document = np.intersect1d(query.indices, terms, assume_unique=True, return_indices=True)
    pairs = zip(shared.tolist(), query.data[in_query].tolist(), weights[in_document].tolist(), strict=True)
    matches = [
        TermMatch(names[term] if term < len(names) else (words or {})[term], ours, theirs, ours * theirs, term >= len(names))
        for term, ours, theirs in pairs
    ]
    return sorted(matches, key=lambda match: -match.product)


def query_words(queries: Queries, text: str) -> dict[str, str]:
    """The words of a query that the tokenizer split, by the name of each of their terms."""
    names = queries.term_names
    return {names[term]: word for term, word in split_words(text, queries.tokens(text), names).items()}


def join_matches(matches: Sequence[TermMatch], words: Mapping[str, str]) -> list[WordMatch]:
    """Shared terms as words, the largest product first; ``words`` is what ``query_words`` returns."""
    model = [match for match in matches if not match.lexical]
    joined = join_pieces((words.get(match.term), match.term, match.product, match) for match in model)
    found = [WordMatch(word, terms, product) for word, product, terms in joined]
    found += [WordMatch(f'"{match.term}"', [match], match.product) for match in matches if match.lexical]
    return sorted(found, key=lambda match: -match.product)
