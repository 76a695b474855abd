"""What goes into an index and what comes out of it, whatever engine holds it."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from anysplade._common.arguments import require
from anysplade._common.tables import Tabular
from anysplade.data.corpus import Document
from anysplade.errors import DataError, OptionError
from anysplade.model.options import checked_option
from anysplade.model.queries import Queries
from anysplade.model.vocabulary import split_words

Filter = Mapping[str, Any]  # metadata that a document must have: a value by name, or a list for any of several
_Value = str | int | float | bool
_SHOWN_NAMES = 20  # in a message


class EncodedDocument(NamedTuple):
    """A document with its sparse vector."""

    id: str  # unique in an index
    content: Document  # title, text and metadata
    terms: np.ndarray  # (active dims,) int32, rising and without duplicates
    weights: np.ndarray  # (active dims,) float32, finite and above 0


def check_vector(label: str, terms: np.ndarray, weights: np.ndarray, vocabulary: int = 2**31) -> tuple[np.ndarray, np.ndarray]:
    """The same as int32 and float32, each (active dims,).

    Engines accept more than they can search: Qdrant takes NaN, and doubled terms change scores after a reload.

    Raises:
        DataError: lengths differ, terms are not whole numbers that rise from 0 or more to less than the vocabulary, or a
            weight is not finite and above 0.
    """
    terms, weights = np.asarray(terms), np.asarray(weights)
    if terms.ndim != 1 or terms.shape != weights.shape:
        raise DataError(f"{label}: terms {terms.shape} and weights {weights.shape}; a vector has one weight for each term")
    if not len(terms):
        return terms.astype(np.int32), weights.astype(np.float32)
    if terms.dtype.kind not in "iu" or terms[0] < 0 or not (terms[1:] > terms[:-1]).all():
        raise DataError(f"{label}: its terms must be int32, 0 or more, rising and each once; sort them and add up duplicates")
    if terms[-1] >= vocabulary:
        raise DataError(f"{label}: a term id outside of the vocabulary of {vocabulary:,}; the vector is of another model")
    with np.errstate(over="ignore"):
        weights = weights.astype(np.float32, copy=False)
    if not (weights.min() > 0 and weights.max() < np.inf):  # false for NaN
        raise DataError(f"{label}: its weights must be finite and above 0; drop zeros, and look for NaN in the model")
    return terms.astype(np.int32, copy=False), weights


def check_vectors(documents: Sequence[EncodedDocument], vocabulary: int) -> None:
    """``check_vector`` of every document, all at once.

    Raises:
        DataError: as ``check_vector`` does, of the first document that is wrong.
    """
    usual = all(
        terms.dtype == np.int32 and weights.dtype == np.float32 and terms.ndim == 1 and terms.shape == weights.shape
        for _, _, terms, weights in documents
    )
    if usual and documents:
        terms = np.concatenate([document.terms for document in documents])
        weights = np.concatenate([document.weights for document in documents])
        begins = np.zeros(len(terms) + 1, bool)
        begins[np.cumsum([len(document.terms) for document in documents])] = True
        rising = (terms[1:] > terms[:-1]) | begins[1:-1]
        if rising.all() and ((terms >= 0) & (terms < vocabulary) & np.isfinite(weights) & (weights > 0)).all():
            return
    for document in documents:
        check_vector(f"document {document.id[:80]!r}", document.terms, document.weights, vocabulary)


def check_documents(documents: object) -> None:
    """Raise OptionError unless it is a mapping of ids to documents."""
    fix = 'give {"id": anysplade.Document(title="", text="…")}'
    if not isinstance(documents, Mapping):
        raise OptionError(f"documents are a {type(documents).__name__}; {fix}, or the path of a file")
    for id_, document in documents.items():
        if not isinstance(id_, str) or not isinstance(document, Document):
            kinds = f"{type(id_).__name__} to a {type(document).__name__}"
            raise OptionError(f"document {str(id_)[:80]!r}: a {kinds}; {fix}")


def check_query(query: object) -> None:
    """Raise OptionError unless it is one text."""
    require("query", query, str, "give one text; of several, search each by itself")


def check_hits(k: object) -> int:
    """How many hits are asked for.

    Raises:
        OptionError: no whole number, or one below 1.
    """
    count: int = checked_option("k", k, int)
    if count < 1:
        raise OptionError(f"k is {count}: ask for at least 1 hit")
    return count


def check_encoding(top_k: Any, max_length: Any, workers: Any) -> tuple[int | None, int | None, int]:
    """Options of encoding documents as whole numbers.

    Raises:
        OptionError: one is none, or is below 1.
    """
    checked = (
        checked_option("top_k", top_k, int | None),
        checked_option("max_length", max_length, int | None),
        checked_option("workers", workers, int),
    )
    for name, value in zip(("top_k", "max_length", "workers"), checked, strict=True):
        if value is not None and value < 1:
            raise OptionError(f"`{name}` is {value}: it is at least 1")
    return checked


# ----------------------------------------------------------------------------------------- filters


class Tags(NamedTuple):
    """Metadata as every engine holds and compares it; see ``tag``."""

    names: list[str]  # "lang", "author.name"
    values: list[str]  # "lang=en", "author.name=anna"


def tag(metadata: Mapping[str, Any] | None) -> Tags:
    """The names and the values of a document's metadata, as texts.

    Values are the same if their texts are, without blanks around them and whatever the case: ``true`` and ``"True"``, 7 and
    ``"7"``; 7.0 is also ``"7"``. The same holds for names. A list has each of its items, and what is in an object has the
    object's name before it: ``author.name``.
    """
    names, values = dict[str, None](), dict[str, None]()  # in their order, each once

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for inner, item in value.items():
                add(f"{name}.{inner}", item)
        elif isinstance(value, list | tuple):
            for item in value:
                add(name, item)
        elif value is not None:
            (plain,) = _texts(name)
            names[plain] = None
            values.update({f"{plain}={text}": None for text in _texts(value)})

    for name, value in (metadata or {}).items():
        add(name, value)
    return Tags(list(names), list(values))


def _texts(value: _Value) -> list[str]:
    """The texts that a value is the same as."""
    texts = [str(int(value))] if isinstance(value, float) and value.is_integer() else []
    plain = unicodedata.normalize("NFC", str(value).strip().casefold())
    return [*texts, plain.encode("utf-8", "backslashreplace").decode()]  # an engine takes no lone surrogates


def check_filter(filter: Filter | None) -> list[Tags]:
    """What a document must have: of each of these the name, and one of the values.

    Raises:
        OptionError: a name that is empty, or a value that is no text, number or truth value.
    """
    if filter is not None and not isinstance(filter, Mapping):
        raise OptionError(f'filter is a {type(filter).__name__}; give {{"name": value}}, such as {{"lang": "en"}}')
    conditions = []
    for name, value in (filter or {}).items():
        values = list(value) if isinstance(value, list | tuple) else [value]
        if name == "" or not values or not all(isinstance(value, _Value) for value in values):
            raise OptionError(
                f'filter {str(name)[:80]!r}: {str(values)[:80]}; give {{"name": value}} or a list of values, '
                "each a text, a number or a bool"
            )
        conditions.append(tag({name: values}))
    return conditions


class Tagged(Protocol):
    """What holds documents with their tags."""

    def has(self, kind: Literal["names", "values"], *conditions: Sequence[str]) -> bool:
        """Whether a document has, for each condition, one of its tags."""

    def names(self, limit: int) -> list[str]:
        """Names that documents have, the most frequent first."""


def explain_filter(held: Tagged, filter: Filter | None) -> str | None:
    """Why a search with a filter found nothing, in one line; None without a filter.

    Raises:
        OptionError: a name that no document has.
    """
    conditions = check_filter(filter)
    for names, values in conditions:
        if not held.has("names", names):
            known = ", ".join(held.names(_SHOWN_NAMES))
            raise OptionError(
                f'filter {names[0][:80]!r}: no document has this name in its "metadata"; '
                + (f"names there: {known}" if known else "none has any; build the index from lines with a metadata object")
            )
        if not held.has("values", values):
            return f"no document has {' or '.join(values)[:200]}"
    wanted = " and ".join(" or ".join(values) for _, values in conditions)[:200]
    if not held.has("values", *(values for _, values in conditions)):
        return f"no document has {wanted} together"
    return f"no document with {wanted} shares a term with the query" if conditions else None


# -------------------------------------------------------------------------------------------- hits


@dataclass(frozen=True)
class TermMatch:
    """A term that a query and a document share."""

    term: str  # its token, or ``[term:ID]``
    query_weight: float  # in the vector of the query
    document_weight: float  # in the vector of the document
    product: float  # of the two weights: what the term adds to the score


class WordMatch(NamedTuple):
    """A shared word as a person reads it."""

    word: str  # a term's name, or a word of the query whose pieces are terms
    terms: list[TermMatch]  # the term, or the pieces that are shared
    product: float  # the sum of theirs


def query_words(queries: Queries, text: str) -> dict[str, str]:
    """The words of a query that its tokenizer split, by the term of each of their pieces."""
    names = queries.term_names
    return {names[term]: word for term, word in split_words(text, queries.tokens(text), names).items()}


def join_matches(matches: Sequence[TermMatch], words: Mapping[str, str]) -> list[WordMatch]:
    """Shared terms as words, the largest product first.

    Args:
        words: of the query; see ``query_words``.
    """
    joined: dict[tuple[str, bool], list[TermMatch]] = {}  # a word can have the name of another term
    for match in matches:
        joined.setdefault((words.get(match.term, match.term), match.term in words), []).append(match)
    found = [WordMatch(word, terms, sum(term.product for term in terms)) for (word, _), terms in joined.items()]
    return sorted(found, key=lambda match: -match.product)


@dataclass(frozen=True, repr=False)
class Hit(Tabular):
    """A document that a search returned."""

    id: str  # of the document
    score: float  # dot product of the two vectors
    title: str  # of the document; empty without one
    text: str  # of the document
    metadata: dict[str, Any] | None = None  # of the document
    terms: list[TermMatch] | None = None  # with ``explain``: the largest product first; the products sum to the score

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    def _rows(self) -> list[dict[str, Any]]:
        """All but the metadata; of each term what it adds to the score."""
        terms = {} if self.terms is None else {"terms": " ".join(f"{match.term} {match.product:.2f}" for match in self.terms)}
        return [{"id": self.id, "score": self.score, "title": self.title, "text": self.text} | terms]


class Hits(list[Hit], Tabular):
    """The hits of a search, the best first: a list that shows itself as a table."""

    __repr__ = Tabular.__repr__

    def _rows(self) -> list[dict[str, Any]]:
        return [{"rank": rank} | hit._rows()[0] for rank, hit in enumerate(self, 1)]
