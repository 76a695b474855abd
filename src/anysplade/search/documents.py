"""Documents with their sparse vectors, and the checks that every index makes of them."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from anysplade.data.corpus import Document
from anysplade.errors import DataError, OptionError


class EncodedDocument(NamedTuple):
    """A document with its sparse vector."""

    id: str  # unique in an index
    content: Document  # title, text and metadata
    terms: np.ndarray  # (active dims,) int32, rising and without duplicates
    weights: np.ndarray  # (active dims,) float32, finite and above 0


def check_vector(label: str, terms: np.ndarray, weights: np.ndarray, vocabulary: int = 2**31) -> tuple[np.ndarray, np.ndarray]:
    """Return the vector as int32 terms and float32 weights, (active dims,) each.

    Engines accept vectors that they cannot search: Qdrant takes NaN, and repeated terms change scores after a reload.

    Args:
        label: names the vector in messages.
        vocabulary: number of terms of the model.

    Raises:
        DataError: the lengths differ; the terms are not integers that rise from 0 or more to less than ``vocabulary``; or a
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
        raise DataError(f"{label}: a term id is outside of the vocabulary of {vocabulary:,}; use the model of the index")
    with np.errstate(over="ignore"):
        weights = weights.astype(np.float32, copy=False)
    if not (weights.min() > 0 and weights.max() < np.inf):  # False for NaN
        raise DataError(f"{label}: its weights must be finite and above 0; drop zeros, and look for NaN in the model")
    return terms.astype(np.int32, copy=False), weights


def check_document(document: EncodedDocument, vocabulary: int = 2**31) -> EncodedDocument:
    """Return the document with its vector as ``check_vector`` returns it, and raise the same errors."""
    terms, weights = check_vector(f"document {document.id[:80]!r}", document.terms, document.weights, vocabulary)
    return document._replace(terms=terms, weights=weights)


def check_documents(documents: object) -> None:
    """Raise OptionError unless ``documents`` maps ids to documents."""
    fix = 'give {"id": anysplade.Document(title="", text="…")}'
    if not isinstance(documents, Mapping):
        raise OptionError(f"documents are a {type(documents).__name__}; {fix}, or the path of a file")
    for id_, document in documents.items():
        if not isinstance(id_, str) or not isinstance(document, Document):
            kinds = f"{type(id_).__name__} to a {type(document).__name__}"
            raise OptionError(f"document {str(id_)[:80]!r}: maps a {kinds}; {fix}")
