"""Texts by id, for training examples that have ids instead of texts."""

import contextlib
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from anysplade.data.corpus import ID_NAMES, TEXT_NAMES, Document, read_corpus
from anysplade.data.external import hub_dataset
from anysplade.data.names import CORPUS_FILES, Source
from anysplade.data.queries import QUERY_NAMES, ir_queries, read_queries
from anysplade.data.rows import Place, find_file
from anysplade.data.text import replace_surrogates
from anysplade.errors import DataError

_GetText = Callable[[str], str]  # raises KeyError for an unknown id


class Texts(NamedTuple):
    """The texts of a collection, by id."""

    name: str
    query: _GetText
    document: _GetText

    def get(self, role: str, id_: str) -> str:
        """The text of a query or of a document in any other role; KeyError for an unknown id."""
        return self.query(id_) if role == "query" else self.document(id_)


class Lookup:
    """Texts by id from a collection that is opened when the first id is looked up.

    Args:
        open_texts: opens the collection; returns None if there is none.
        given: whether the user named the collection with ``texts``.
    """

    def __init__(self, open_texts: Callable[[], Texts | None], given: bool) -> None:
        self._open = functools.cache(open_texts)
        self.given = given

    def text(self, role: str, id_: Any, place: str) -> str:
        """The text of an id, which must be in the collection and have a text that is not empty."""
        texts = self._open()
        if texts is None:
            raise DataError(f"{place}: the row has ids; name the collection of their texts with `texts`")
        kind = "query" if role == "query" else "document"
        try:
            text = texts.get(role, str(id_))
        except KeyError:
            raise DataError(f"{place}: the {kind} {str(id_)!r} is not in {texts.name}; add it there or remove the row") from None
        if not text.strip():
            raise DataError(f"{place}: the {kind} {str(id_)!r} has an empty text in {texts.name}; remove the row")
        return replace_surrogates(text)

    def has(self, role: str, id_: str) -> bool:
        """Whether a text is an id of the collection."""
        texts = self._open()
        if texts is None:
            return False
        try:
            texts.get(role, id_)
        except KeyError:
            return False
        return True

    def are_ids(self, role: str, texts: Sequence[str]) -> bool:
        """Whether all texts are ids of the collection, which is opened only if each looks like an id."""
        if not texts or not all(re.fullmatch("[!-~]+", text) for text in texts):
            return False
        with contextlib.suppress(DataError):  # for example, a corpus without queries has no texts of query ids
            return all(self.has(role, text) for text in texts)
        return False


def open_texts(source: Source) -> Texts:
    """The texts of a collection, which must have queries and documents."""
    if source.kind == "folder":
        return _beir_texts(source.at)
    if source.kind == "ir_datasets":
        store = source.at.docs_store()  # reads documents from disk
        return Texts(source.name, ir_queries(source.at).__getitem__, lambda id_: store.get(id_).default_text())
    if source.kind == "hub":
        queries, documents = (hub_dataset(str(source.at), config) for config in ("queries", "corpus"))
        return Texts(source.name, _table_texts(queries, QUERY_NAMES), _table_texts(documents, TEXT_NAMES))
    raise DataError(f"{source.name}: has no queries and documents for the ids; name a collection that has both")


def folder_texts(folder: Place) -> Texts | None:
    """The texts of the collection in a folder; None if there is no corpus."""
    return None if find_file(folder, CORPUS_FILES) is None else _beir_texts(folder)


def _beir_texts(folder: Place) -> Texts:
    queries, corpus = read_queries(folder), read_corpus(folder)
    return Texts(str(folder), queries.__getitem__, lambda id_: corpus[id_].full_text)


def _table_texts(table: Any, text_names: Sequence[str]) -> _GetText:
    """The texts, with their titles, of a memory-mapped table; only the ids are in memory.

    If no column has a known name, the first one has the ids, and the last one the texts.
    """
    columns = table.column_names
    text_column = next((name for name in text_names if name in columns), columns[-1])
    ids = table[next((name for name in ID_NAMES if name in columns), columns[0])]
    numbers = {str(id_): i for i, id_ in enumerate(ids)}

    def text(id_: str) -> str:
        row = table[numbers[id_]]
        return Document(row.get("title") or "", row[text_column]).full_text

    return text
