"""The lexical part of an index: BM25 as further dimensions of the sparse vector of a document.

The stems of a text are terms after those of the model, numbered by a table of the database. A stem has the saturated count of BM25
in a document, and its inverse document frequency times its count in a query: the products of both sum to BM25. The table keeps the
document frequencies up to date. The average length is fixed by the first build, so that a weight depends on its document alone.
"""

import math
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from anysplade.errors import OptionError
from anysplade.model.options import checked_option
from anysplade.search.documents import EncodedDocument

if TYPE_CHECKING:
    from anysplade.search.analysis import Analyzer

STEMS = "CREATE TABLE stems (id INTEGER PRIMARY KEY, stem TEXT NOT NULL UNIQUE, df INTEGER NOT NULL)"  # df: document frequency
PREFIX = "stem:"  # of the names of stems among the terms of an index
AUTO = "auto"  # the language of the texts
_SAMPLE, _LENGTH = 2000, 500  # texts whose language is told, and characters of each
_BATCH = 1024  # texts that are analyzed together, and values per query of SQLite, which limits them


def check_weight(weight: object) -> float | None:
    """BM25's weight as a float, or None; raises OptionError unless it is a number above 0."""
    checked: float | None = checked_option("`lexical`", weight, float | None)
    if checked is not None and not 0 < checked < math.inf:
        raise OptionError(f"`lexical` is {checked}: BM25's weight is above 0, such as 3; leave it out for the model alone")
    return None if checked is None else float(checked)


def check_lexical(weight: object, with_bm25: bool, language: str) -> dict[str, Any]:
    """What an index records of ``lexical``, ``with_bm25`` and ``language``; raises OptionError if one is impossible."""
    checked = check_weight(weight)
    if checked is None and not with_bm25:
        if language != AUTO:
            raise OptionError(f"`language` is {language!r}: of BM25's stems, which this index has none of; add `with_bm25`")
        return {"lexical": None, "with_bm25": False, "language": None}
    from anysplade.search.languages import language_name

    return {"lexical": checked, "with_bm25": True, "language": language_name(language)}


class QueryStems(NamedTuple):
    """The stems of a query that some document has."""

    terms: np.ndarray  # (stems,) int32, rising
    weights: np.ndarray  # (stems,) float32: Lucene's inverse document frequency times the count in the query
    words: dict[int, str]  # by term, if asked for: the first word of the query with this stem


class Lexical:
    """Turns texts into stems for the database of an index."""

    def __init__(self, vocabulary: int, average_length: float, language: str) -> None:
        """Take the number of the model's terms, which the stems follow, the mean number of stems per document, and the language."""
        self.vocabulary = vocabulary
        self._average_length = average_length
        self._language = language

    @cached_property
    def _analyzer(self) -> "Analyzer":
        return _open_analyzer(self._language)

    def width(self, database: sqlite3.Connection) -> int:
        """The number of terms: the model's, and the stems."""
        return int(database.execute("SELECT coalesce(max(id) + 1, ?) FROM stems", (self.vocabulary,)).fetchone()[0])

    def append(self, database: sqlite3.Connection, documents: Sequence[EncodedDocument]) -> list[EncodedDocument]:
        """The documents with their stems after their terms; counts them in the table, in the caller's transaction."""
        from anysplade.search.bm25 import K1, B

        counts = _count_stems(self._analyzer, [document.content.full_text for document in documents])
        frequency = Counter(chain.from_iterable(counts))
        ids = _read_ids(database, list(frequency))
        new = [stem for stem in frequency if stem not in ids]
        ids |= {stem: id_ for id_, stem in enumerate(new, self.width(database))}
        rows = [(ids[stem], stem, count) for stem, count in frequency.items()]
        database.executemany("INSERT INTO stems VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET df = df + excluded.df", rows)
        found = []
        for document, count in zip(documents, counts, strict=True):
            terms = np.array([ids[stem] for stem in count], np.int32)
            times = np.array(list(count.values()), np.float64)
            weights = times / (times + K1 * (1 - B + B * times.sum() / self._average_length))
            order = np.argsort(terms)
            terms, weights = terms[order], weights[order].astype(np.float32)
            terms, weights = np.concatenate([document.terms, terms]), np.concatenate([document.weights, weights])
            found.append(document._replace(terms=terms, weights=weights))
        return found

    def subtract(self, database: sqlite3.Connection, terms: Iterable[bytes]) -> None:
        """Take documents with these stored terms out of the counts of the table, in the caller's transaction."""
        removed = np.frombuffer(b"".join(terms), np.int32)
        ids, counts = np.unique(removed[removed >= self.vocabulary], return_counts=True)
        rows = zip(counts.tolist(), ids.tolist(), strict=True)
        database.executemany("UPDATE stems SET df = df - ? WHERE id = ?", rows)

    def query(self, database: sqlite3.Connection, text: str, documents: int, with_words: bool = False) -> QueryStems:
        """The stems of a query for an index with this number of documents."""
        stems = _in_order(self._analyzer, text)
        count = Counter(stems)
        known = sorted(_read(database, "SELECT id, df, stem FROM stems WHERE df > 0 AND stem", list(count)))
        # Lucene's formula: log(1 + (N - df + 0.5) / (df + 0.5))
        weights = [count[stem] * math.log1p((documents - df + 0.5) / (df + 0.5)) for _, df, stem in known]
        terms = np.array([id_ for id_, _, _ in known], np.int32)
        words: dict[int, str] = {}
        if with_words:
            first = dict(reversed(list(zip(stems, _in_order(_open_analyzer(self._language, stemmed=False), text), strict=True))))
            words = {id_: first[stem] for id_, _, stem in known}
        return QueryStems(terms, np.array(weights, np.float32), words)


def stem_names(database: sqlite3.Connection) -> list[str]:
    """The names of the stems by id, from that of the vocabulary's size on: ``stem:retriev``. No stem contains a colon."""
    return [PREFIX + stem for (stem,) in database.execute("SELECT stem FROM stems ORDER BY id")]


def find_language(texts: Iterable[str], language: str) -> str:
    """The language of BM25 by its name; for "auto" that of up to 2,000 texts, evenly spread, of those that are then read once."""
    from anysplade.search.bm25 import language_of

    if language != AUTO:
        return language_of([], language)
    sample: list[str] = []
    step = 1
    for number, text in enumerate(texts):
        if number % step == 0:
            sample.append(text[:_LENGTH])
        if len(sample) > _SAMPLE:
            sample, step = sample[::2], 2 * step
    return language_of(sample, AUTO)


def average_length(texts: Iterable[str], language: str) -> float:
    """The mean number of stems, each occurrence counted, of texts that are read once; 1 if none has a stem."""
    analyzer, iterator = _open_analyzer(language), iter(texts)
    stems = count = 0
    while batch := list(islice(iterator, _BATCH)):
        stems += sum(map(len, analyzer.tokens(batch).ids))
        count += len(batch)
    return stems / count if stems else 1.0


def _open_analyzer(language: str, stemmed: bool = True) -> "Analyzer":
    from anysplade.search.analysis import Analyzer  # bm25s and PyStemmer, which other searches do not need

    return Analyzer(language, stemmed)


def _count_stems(analyzer: "Analyzer", texts: Sequence[str]) -> list[Counter[str]]:
    """How often each text has each of its stems."""
    tokens = analyzer.tokens(texts)
    stems = {number: stem for stem, number in tokens.vocab.items()}
    return [Counter(stems[number] for number in numbers) for numbers in tokens.ids]


def _in_order(analyzer: "Analyzer", text: str) -> list[str]:
    """The stems of a text, or its words, as they follow each other."""
    tokens = analyzer.tokens([text])
    names = {number: name for name, number in tokens.vocab.items()}
    return [names[number] for number in tokens.ids[0]]


def _read_ids(database: sqlite3.Connection, stems: Sequence[str]) -> dict[str, int]:
    return dict(_read(database, "SELECT stem, id FROM stems WHERE stem", stems))


def _read(database: sqlite3.Connection, query: str, values: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Rows of a query that ends in the name of a column, where the column has one of the values."""
    for start in range(0, len(values), _BATCH):
        part = values[start : start + _BATCH]
        yield from database.execute(f"{query} IN ({','.join('?' * len(part))})", part).fetchall()
