"""Documents as rows of the database of an index."""

import json
from typing import Any

import numpy as np

from anysplade.data.corpus import Document
from anysplade.search.documents import EncodedDocument, read_metadata


def content_row(document: Document) -> tuple[str | bytes, str | bytes, str | None]:
    """The columns title, text and metadata."""
    metadata = None if document.metadata is None else json.dumps(document.metadata)
    return to_sqlite(document.title), to_sqlite(document.text), metadata


def from_row(row: tuple[Any, ...]) -> EncodedDocument:
    """A document from a row of the view ``documents``."""
    _, id_, title, text, metadata, terms, weights = row
    content = Document(from_sqlite(title), from_sqlite(text), read_metadata(metadata))
    return EncodedDocument(from_sqlite(id_), content, np.frombuffer(terms, np.int32), np.frombuffer(weights, np.float32))


def to_sqlite(text: str) -> str | bytes:
    """Text as SQLite stores it: UTF-8, or bytes if it has a lone surrogate, which JSON allows and UTF-8 does not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
    return text


def from_sqlite(value: str | bytes) -> str:
    """The text that ``to_sqlite`` stored."""
    return value.decode("utf-8", "surrogatepass") if isinstance(value, bytes) else value
