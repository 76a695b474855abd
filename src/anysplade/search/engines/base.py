"""The parts that engines on servers share: checks, uploads that send only changes, retries, and errors of one line."""

import contextlib
import hashlib
import json
import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from anysplade._common.arguments import require, require_list
from anysplade._common.progress import bar
from anysplade.errors import AnyspladeError, DataError, OptionError, OutputError, without_credentials
from anysplade.search.documents import EncodedDocument, check_document, check_vector
from anysplade.search.filters import Filter, Tagged, Tags, check_filter, explain_filter, tag
from anysplade.search.hits import Hit, Hits, check_count

logger = logging.getLogger(__name__)

T = TypeVar("T")

SHOWN = ["id", "title", "text", "metadata"]  # stored fields that a hit has
BUSY = (429, 503)  # HTTP statuses after which the same request may succeed
_FIXES: dict[int | None, str] = {
    **dict.fromkeys((None, 200), "check its address, and that the server runs"),  # 200: another kind of server
    **dict.fromkeys(BUSY, "the server is busy; try again later"),
}
_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each retry
_DELETED_AT_ONCE = 1000  # documents per request


class ServerEngine(Tagged):
    """An index on a server; a subclass calls the client library. Methods raise AnyspladeError if the server fails or refuses."""

    errors: tuple[type[Exception], ...]  # of the client library
    login: str  # how to fix an error of authorization

    def __init__(self, client: Any, name: str, label: str) -> None:
        self.client = client
        self.name = name
        self.label = label  # in messages

    def create(self, about: Mapping[str, Any]) -> None:
        """Create the index unless it exists.

        Args:
            about: a JSON object with ``model_fingerprint`` that is stored as the description of the index.

        Raises:
            OutputError: the index exists and was made by an earlier version, or with another model, precision, ``top_k`` or
                ``max_length``; or the server is too old to store a description.
            OptionError: ``about`` has no fingerprint.
        """
        require("about", about, Mapping, 'give {"model": name, "model_fingerprint": fingerprint}')
        if not about.get("model_fingerprint"):
            raise OptionError("about: no model_fingerprint; without it vectors of different models would be mixed")
        stored = self._about()
        if stored is None:
            self._create({**about, "tagged": True})
        else:
            require_same_model(self.label, stored, about)

    def about(self) -> dict[str, Any]:
        """The description that ``create`` stored; empty if the index was made without it.

        Raises:
            DataError: the index does not exist.
        """
        about = self._about()
        if about is None:
            raise DataError(f"{self.label}: does not exist; create it first")
        return about

    def upload(self, documents: Iterable[EncodedDocument], batch: int = 256, progress: bool = False) -> int:
        """Add documents, or replace those with the same id; documents that the server already has are not sent again.

        A batch is sent again up to five times while the connection fails or the server answers 429 or 503. Search finds the
        documents when this method returns.

        Args:
            batch: documents per request; if a batch has several documents with the same id, the last is stored.

        Returns:
            The number of documents that were sent.

        Raises:
            DataError: a document, which is named, cannot be stored; the batches before it are stored.
            OptionError: ``batch`` is below 1.
        """
        self.about()  # raises if the index does not exist
        batch = check_count("batch", batch)
        sent = 0
        source = iter(documents)
        with bar("uploading", "document", show=progress) as shown:
            while part := list(islice(source, batch)):
                prepared = {document.id: (document, _payload(document)) for document in map(check_document, part)}
                stored = self._stored_hashes([self.key(id_) for id_ in prepared])
                changed = [pair for id_, pair in prepared.items() if stored.get(self.key(id_)) != pair[1]["hash"]]
                if changed:
                    self._send(changed)
                sent += len(changed)
                shown.update(len(part))
        self._refresh()
        return sent

    def search(self, terms: np.ndarray, weights: np.ndarray, k: int, filter: Filter | None = None) -> Hits:
        """The k documents of the largest scores, best first. A document without a term of the query is not found.

        Args:
            terms: (active dims,) int32, rising.
            weights: (active dims,) float32, above 0.
            filter: metadata that a document must have: ``{"lang": "en"}``, or a list for any of several values; see ``tag``.

        Raises:
            DataError: the vector is malformed; or there is a filter, and an earlier version made the index.
            OptionError: k or the filter is invalid, or no document has a name of the filter.
        """
        terms, weights = check_vector("the query", terms, weights)
        k, conditions = check_count("k", k), check_filter(filter)
        with self._created():
            found = self._search(terms, weights, k, conditions) if len(terms) else []
        if conditions and not found:
            if not self.about().get("tagged"):
                raise DataError(
                    f"{self.label}: was made by an earlier version, where filters find nothing; build it again under another name"
                )
            return Hits(note=explain_filter(self, filter))
        return Hits(Hit(score=score, **payload) for score, payload in found)

    def delete(self, ids: Iterable[str]) -> None:
        """Delete the documents with these ids; ids without a document are ignored."""
        keys = map(self.key, require_list("ids", ids, "id"))
        with self._created():
            while part := list(islice(keys, _DELETED_AT_ONCE)):
                self._delete(part)
            self._refresh()

    @contextlib.contextmanager
    def _created(self) -> Iterator[None]:
        """A block whose errors say so if the index does not exist."""
        try:
            yield
        except (AnyspladeError, ValueError):  # ValueError: of a Qdrant client in memory
            self.about()
            raise

    def ask(self, call: Callable[..., T], *args: Any, again: bool = False, **kwargs: Any) -> T:
        """The result of a call of the client library.

        Args:
            again: retry while the server is busy, up to five times after 0.5 to 8 seconds.

        Raises:
            AnyspladeError: the server cannot be reached or refuses.
        """
        pauses = iter(_PAUSES if again else ())
        while True:
            try:
                return call(*args, **kwargs)
            except self.errors as error:
                why, status = self._explain(error)
            line = without_credentials(" ".join(why.split()))[:300]
            pause = next(pauses, None)
            if pause is None or status not in (None, *BUSY):
                fix = self.login if status in (401, 403) else _FIXES.get(status, "its log may say more")
                raise AnyspladeError(f"{self.label}: {line}; {fix}")
            logger.info("trying again in %.1f s: %s", pause, line)
            time.sleep(pause)

    @abstractmethod
    def count(self) -> int:
        """The number of documents."""

    @staticmethod
    @abstractmethod
    def key(id_: str) -> str:
        """The id that the server gives to a document."""

    @abstractmethod
    def _create(self, about: dict[str, Any]) -> None: ...

    @abstractmethod
    def _about(self) -> dict[str, Any] | None:
        """The stored description, or None if the index does not exist."""

    @abstractmethod
    def _stored_hashes(self, keys: list[str]) -> dict[str, str]: ...

    @abstractmethod
    def _send(self, documents: list[tuple[EncodedDocument, dict[str, Any]]]) -> None:
        """Store documents, each with the fields that are stored beside its vector."""

    @abstractmethod
    def _search(self, terms: np.ndarray, weights: np.ndarray, k: int, conditions: Sequence[Tags]) -> list[tuple[float, Any]]:
        """The scores and the ``SHOWN`` fields of the k best documents, the best first."""

    @abstractmethod
    def _delete(self, keys: list[str]) -> None: ...

    @abstractmethod
    def _refresh(self) -> None:
        """Let search see all changes."""

    @abstractmethod
    def _explain(self, error: Any) -> tuple[str, int | None]:
        """Why a request failed, and the HTTP status of the answer; None without an answer."""


def require_same_model(label: str, stored: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Raise OutputError if the description of an existing index differs from ``about`` in anything that changes a vector."""
    different = [name for name in ("precision", "top_k", "max_length") if stored.get(name) != about.get(name)]
    if stored.get("model_fingerprint") != about["model_fingerprint"]:
        what = f"holds vectors of another model ({stored.get('model', 'unknown')})"
    elif not stored.get("tagged"):
        what = "was made by an earlier version"
    elif different:
        what = f"was made with another {', '.join(different)} ({', '.join(str(stored.get(name)) for name in different)})"
    else:
        return
    raise OutputError(f"{label}: exists and {what}; choose another name, or delete it first")


def _payload(document: EncodedDocument) -> dict[str, Any]:
    """The stored fields of a document apart from its vector, with the tags for filters and the hash of its content and vector.

    Raises:
        DataError: the text or metadata cannot be sent as JSON.
    """
    try:
        content = json.dumps([document.id, *document.content], sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:  # ValueError: NaN, or a lone surrogate
        raise DataError(f"document {document.id[:80]!r}: cannot be sent as JSON ({error}); fix its text or metadata") from None
    vector = document.terms.tobytes() + document.weights.tobytes()
    digest = hashlib.sha256(content + b"\0" + vector).hexdigest()  # JSON contains no zero byte
    fields = {name: value for name, value in document.content._asdict().items() if value is not None}
    return {"id": document.id, "hash": digest} | fields | tag(document.content.metadata)._asdict()
