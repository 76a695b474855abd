"""What goes to a server: checked, hashed, in batches, and again when the server was busy."""

import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from anysplade.errors import DataError, OptionError, OutputError
from anysplade.records import Encoded

logger = logging.getLogger(__name__)

Value = str | int | bool
Hashed = dict[str, tuple[Encoded, str]]  # documents and their content hashes, by id
T = TypeVar("T")

_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds, before another try


def check_vector(said: str, terms: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same as int32 and float32, each (active dims,).

    Engines accept more than they can search: Qdrant takes NaN, and doubled terms change scores after a reload.

    Raises:
        DataError: lengths differ, terms are not whole numbers that rise from 0 or more, or a weight is not finite and above 0.
    """
    terms, weights = np.asarray(terms), np.asarray(weights)
    if terms.ndim != 1 or terms.shape != weights.shape:
        raise DataError(f"{said}: terms {terms.shape} and weights {weights.shape}; a vector has one weight for each term")
    if not len(terms):
        return terms.astype(np.int32), weights.astype(np.float32)
    if terms.dtype.kind not in "iu" or terms[0] < 0 or terms[-1] > np.iinfo(np.int32).max or not (terms[1:] > terms[:-1]).all():
        raise DataError(f"{said}: its terms must be int32, 0 or more, rising and each once; sort them and add up what stands twice")
    with np.errstate(over="ignore"):
        weights = weights.astype(np.float32)
    if not (np.isfinite(weights) & (weights > 0)).all():
        raise DataError(f"{said}: its weights must be finite and above 0; drop zeros, and look for NaN in the model")
    return terms.astype(np.int32), weights


def check_filter(filter: Mapping[str, Any] | None) -> dict[str, list[Value]]:
    """Metadata names and the values of which a document must have one.

    Raises:
        OptionError: a value that is no text, whole number or truth value; engines disagree on the equality of others.
    """
    checked = {name: list(value) if isinstance(value, list | tuple) else [value] for name, value in (filter or {}).items()}
    for name, values in checked.items():
        if not name or '"' in name or not values or not all(isinstance(value, Value) for value in values):
            raise OptionError(
                f'filter {name!r}: {str(values)[:80]}; give {{"name": value}} or a list of values, each a text, an int or a bool'
            )
    return checked


def hashed_batches(documents: Iterable[Encoded], size: int, progress: bool) -> Iterator[Hashed]:
    """Checked documents, at most ``size`` at once; of an id that stands twice in a batch the last is kept.

    Raises:
        OptionError: ``size`` is below 1.
        DataError: a vector is malformed, or a text or metadata cannot be sent as JSON.
    """
    if size < 1:
        raise OptionError(f"batch {size}: give 1 or more")
    source = iter(documents)
    with tqdm(desc="uploading", unit="document", disable=not progress, leave=False, file=sys.stderr) as bar:
        while batch := list(islice(source, size)):
            yield {document.id: _hashed(document) for document in batch}
            bar.update(len(batch))


def _hashed(document: Encoded) -> tuple[Encoded, str]:
    said = f"document {document.id[:80]!r}"
    terms, weights = check_vector(said, document.terms, document.weights)
    try:
        content = json.dumps([document.id, *document.document], sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:  # a lone surrogate is a ValueError too
        raise DataError(f"{said}: cannot be sent as JSON ({error}); mend its text or metadata") from None
    digest = hashlib.sha256(content + b"\0" + terms.tobytes() + weights.tobytes()).hexdigest()  # JSON has no zero byte
    return document._replace(terms=terms, weights=weights), digest


def check_about(about: Mapping[str, Any]) -> None:
    """Raise OptionError unless ``about`` says which model the vectors are of."""
    if not about.get("model_fingerprint"):
        raise OptionError("about: no model_fingerprint; without it vectors of different models would be mixed")


def same_model(said: str, stored: Mapping[str, Any] | None, about: Mapping[str, Any]) -> None:
    """Raise OutputError unless what the server holds was made with the model of ``about``."""
    if not stored or stored.get("model_fingerprint") != about["model_fingerprint"]:
        model = (stored or {}).get("model", "unknown")
        raise OutputError(f"{said}: exists and holds vectors of another model ({model}); choose another name, or delete it first")


def retried(call: Callable[[], T], busy: Callable[[Exception], bool]) -> T:
    """The call's result, at most five times tried again, after 0.5 to 8 seconds, while the error says that it may help."""
    for pause in _PAUSES:
        try:
            return call()
        except Exception as error:
            if not busy(error):
                raise
            logger.info("trying again in %.1f s: %s", pause, one_line(error))
        time.sleep(pause)
    return call()


def one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]
