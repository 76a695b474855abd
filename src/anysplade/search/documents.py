"""Documents with their sparse vectors, and the checks that every index makes of them."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from anysplade._common.arguments import require
from anysplade._common.files import warn_once
from anysplade.data.corpus import Document, checked_document
from anysplade.errors import DataError, OptionError

_FIX = 'give {"id": anysplade.Document(title="", text="…")}'


class EncodedDocument(NamedTuple):
    """A document with its sparse vector."""

    id: str  # unique in an index
    content: Document  # title, text and metadata
    terms: np.ndarray  # (active dims,) int32, rising and without duplicates
    weights: np.ndarray  # (active dims,) float32, finite and above 0


def check_vector(label: str, terms: np.ndarray, weights: np.ndarray, vocabulary: int = 2**31) -> tuple[np.ndarray, np.ndarray]:
    """Return the vector as int32 terms and float32 weights, (active dims,) each, or raise DataError; ``label`` names it there.

    Engines accept vectors that they cannot search: Qdrant takes NaN, and repeated terms change scores after a reload.
    """
    terms, weights = np.asarray(terms), np.asarray(weights)
    if terms.ndim != 1 or terms.shape != weights.shape:
        raise DataError(f"{label}: terms {terms.shape} and weights {weights.shape}; a vector has one weight for each term")
    if not len(terms):
        return terms.astype(np.int32), weights.astype(np.float32)
    if terms.dtype.kind not in "iu" or terms[0] < 0 or not (terms[1:] > terms[:-1]).all():
        raise DataError(f"{label}: its terms must be int32, 0 or more, rising and each once; sort them and add up duplicates")
    if terms[-1] >= vocabulary:
        raise DataError(f"{label}: a term id is outside of the vocabulary of {vocabulary:,}; use the model of the index")
    with np.errstate(over="ignore"):
        weights = weights.astype(np.float32, copy=False)
    if not (weights.min() > 0 and weights.max() < np.inf):  # False for NaN
        raise DataError(f"{label}: its weights must be finite and above 0; drop zeros, and look for NaN in the model")
    return terms.astype(np.int32, copy=False), weights


def check_document(document: EncodedDocument, vocabulary: int = 2**31) -> EncodedDocument:
    """The document with the parts that ``checked_document`` and ``check_vector`` return; raises the same errors."""
    require("documents", document, EncodedDocument, "give a list of anysplade.EncodedDocument")
    content = _checked_content(document.id, document.content)
    terms, weights = check_vector(f"document {document.id[:80]!r}", document.terms, document.weights, vocabulary)
    return document._replace(content=content, terms=terms, weights=weights)


def check_documents(documents: object) -> dict[str, Document]:
    """The documents by id, each as ``checked_document`` returns it; raises OptionError unless they are documents by id."""
    if not isinstance(documents, Mapping):
        raise OptionError(f"documents are a {type(documents).__name__}; {_FIX}, or the path of a file")
    return {id_: _checked_content(id_, document) for id_, document in documents.items()}


def _checked_content(id_: object, document: Document) -> Document:
    label = f"document {str(id_)[:80]!r}"
    if not isinstance(id_, str) or not isinstance(document, Document):
        raise OptionError(f"{label}: maps a {type(id_).__name__} to a {type(document).__name__}; {_FIX}")
    if not id_:
        raise DataError(f"{label}: its id is empty; give each document an id")
    return checked_document(label, *document)


def read_metadata(stored: str | None) -> dict[str, Any] | None:
    """Metadata from the JSON in an index. Earlier versions stored NaN, which becomes None, and anything but an object too."""
    metadata = None if stored is None else json.loads(stored, parse_constant=lambda _: None)
    if isinstance(metadata, dict | None):
        return metadata
    warn_once(f"the metadata {str(stored)[:80]} of a document is not an object and is left out; add the document again")
    return None
