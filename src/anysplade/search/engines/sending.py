"""Documents on their way to a server: checked, hashed, in batches, and sent again when the server was busy."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

from anysplade._common.progress import bar
from anysplade.errors import DataError, OptionError, OutputError, without_credentials
from anysplade.search.documents import EncodedDocument, check_vector

logger = logging.getLogger(__name__)

Hashed = dict[str, tuple[EncodedDocument, str]]  # documents and their content hashes, by id
T = TypeVar("T")

_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds, before another try


def hashed_batches(documents: Iterable[EncodedDocument], size: int, progress: bool) -> Iterator[Hashed]:
    """Checked documents, at most ``size`` at once; of a duplicate id in a batch the last is kept.

    Raises:
        OptionError: ``size`` is below 1.
        DataError: a vector is malformed, or a text or metadata cannot be sent as JSON.
    """
    if size < 1:
        raise OptionError(f"batch {size}: give 1 or more")
    source = iter(documents)
    with bar("uploading", "document", show=progress) as shown:
        while batch := list(islice(source, size)):
            yield {document.id: _hashed(document) for document in batch}
            shown.update(len(batch))


def _hashed(document: EncodedDocument) -> tuple[EncodedDocument, str]:
    label = f"document {document.id[:80]!r}"
    terms, weights = check_vector(label, document.terms, document.weights)
    try:
        content = json.dumps([document.id, *document.content], sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:  # a lone surrogate is a ValueError too
        raise DataError(f"{label}: cannot be sent as JSON ({error}); fix its text or metadata") from None
    digest = hashlib.sha256(content + b"\0" + terms.tobytes() + weights.tobytes()).hexdigest()  # JSON has no zero byte
    return document._replace(terms=terms, weights=weights), digest


def check_about(about: Mapping[str, Any]) -> dict[str, Any]:
    """What an index keeps of ``about``, and that its documents have tags, which filters are compared with.

    Raises:
        OptionError: ``about`` does not say which model the vectors are of.
    """
    if not about.get("model_fingerprint"):
        raise OptionError("about: no model_fingerprint; without it vectors of different models would be mixed")
    return {**about, "tagged": True}


def require_tags(label: str, about: Mapping[str, Any]) -> None:
    """Raise DataError if the documents have no tags."""
    if not about.get("tagged"):
        raise DataError(f"{label}: was made by an earlier version, where filters find nothing; build it again under another name")


def same_model(label: str, stored: Mapping[str, Any] | None, about: Mapping[str, Any]) -> None:
    """Raise OutputError unless what the server holds was made as ``about`` says, by all that changes a vector, and has tags."""
    if not stored or stored.get("model_fingerprint") != about["model_fingerprint"]:
        model = (stored or {}).get("model", "unknown")
        raise OutputError(f"{label}: exists and holds vectors of another model ({model}); choose another name, or delete it first")
    if not stored.get("tagged"):
        raise OutputError(f"{label}: exists and was made by an earlier version; choose another name, or delete it first")
    different = [name for name in ("precision", "top_k", "max_length") if stored.get(name) != about.get(name)]
    if different:
        raise OutputError(
            f"{label}: exists and was made with another {', '.join(different)} "
            f"({', '.join(str(stored.get(name)) for name in different)}); choose another name, or delete it first"
        )


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
    return without_credentials(" ".join(str(error).split()))[:300]
