"""Texts by id, for training examples that have ids instead of texts."""

import contextlib
import functools
import re
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from anysplade.data.corpus import ID_NAMES, TEXT_NAMES, Document, empty_corpus, iter_corpus
from anysplade.data.external import hub_dataset
from anysplade.data.mapped_texts import TextsById
from anysplade.data.names import CORPUS_FILES, Source
from anysplade.data.queries import QUERY_NAMES, load_queries
from anysplade.data.rows import find_file
from anysplade.data.text import replace_surrogates
from anysplade.errors import DataError

_GetText = Callable[[str], str]  # raises KeyError for an unknown id


class Texts(NamedTuple):
    """The texts of a collection, by id."""

    name: str
    query: _GetText
    document: _GetText
    mapped: tuple[TextsById, TextsById] | None = None  # queries and documents, if they are in memory-mapped files


class Lookup:
    """Texts by id from a collection that is opened when the first id is looked up; ``open_texts`` returns None if there is none."""

    def __init__(self, open_texts: Callable[[], Texts | None], given: bool) -> None:
        self._open = functools.cache(open_texts)
        self.given = given  # whether the user named the collection with ``texts``

    @property
    def mapped(self) -> tuple[TextsById, TextsById] | None:
        """Queries and documents, if the collection is in memory-mapped files."""
        texts = self._open()
        return None if texts is None else texts.mapped

    def text(self, role: str, id_: Any, place: str) -> str:
        """The text of an id, which must be in the collection and have a text that is not empty."""
        texts = self._open()
        if texts is None:
            raise DataError(f"{place}: the row has ids; name the collection of their texts with `texts`")
        kind = "query" if role == "query" else "document"
        text = self.find(role, str(id_))
        if text is None:
            raise DataError(f"{place}: the {kind} {str(id_)!r} is not in {texts.name}; add it there or remove the row")
        if not text.strip():
            raise DataError(f"{place}: the {kind} {str(id_)!r} has an empty text in {texts.name}; remove the row")
        return replace_surrogates(text)

    def find(self, role: str, id_: str) -> str | None:
        """The text of a query, or of a document in any other role; None if the collection does not have the id."""
        texts = self._open()
        if texts is not None:
            with contextlib.suppress(KeyError):
                return texts.query(id_) if role == "query" else texts.document(id_)
        return None

    def are_ids(self, role: str, texts: Sequence[str]) -> bool:
        """Whether all texts are ids of the collection, which is opened only if each looks like an id."""
        if not texts or not all(re.fullmatch("[!-~]+", text) for text in texts):
            return False
        with contextlib.suppress(DataError):  # for example, a corpus without queries has no texts of query ids
            return all(self.find(role, text) is not None for text in texts)
        return False


def open_texts(source: Source) -> Texts:
    """The texts of a collection, which must have queries and documents; those of files are written to a temporary folder."""
    if source.kind == "folder":
        folder = tempfile.TemporaryDirectory(prefix="anysplade-texts-")  # removed when the last text in it is forgotten
        queries = TextsById(load_queries(source).items(), folder, "queries")
        documents = TextsById(((id_, document.full_text) for id_, document in iter_corpus(source)), folder, "documents")
        if not documents.texts:
            raise empty_corpus(source)
        return Texts(str(source.at), queries.__getitem__, documents.__getitem__, (queries, documents))
    if source.kind == "ir_datasets":
        store = source.at.docs_store()  # reads documents from disk
        return Texts(source.name, load_queries(source).__getitem__, lambda id_: store.get(id_).default_text())
    if source.kind == "hub":
        queries, documents = (hub_dataset(str(source.at), config) for config in ("queries", "corpus"))
        return Texts(source.name, _table_texts(queries, QUERY_NAMES), _table_texts(documents, TEXT_NAMES))
    raise DataError(f"{source.name}: has no queries and documents for the ids; name a collection that has both")


def own_texts(source: Source) -> Texts | None:
    """The texts of the collection that training data are part of; None if a file or folder has no corpus beside or in it."""
    if source.kind == "file":
        source = Source("folder", source.name, source.at.parent)
    return None if source.kind == "folder" and find_file(source.at, CORPUS_FILES) is None else open_texts(source)


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
