"""Qdrant, as a server or a cluster: exact dot products over a named sparse vector."""

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, Literal, TypeVar

import httpx
import numpy as np
from qdrant_client import QdrantClient, models
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from anysplade.errors import AnyspladeError, DataError, OptionError, OutputError
from anysplade.search.documents import EncodedDocument, Filter, Hit, Tags, check_filter, check_vector, explain_filter, tag
from anysplade.search.engines.sending import check_about, hashed_batches, one_line, require_tags, retried, same_model

T = TypeVar("T")

_VECTOR = "splade"
_DELETED_AT_ONCE = 1000


class QdrantEngine:
    """A collection. Every method raises AnyspladeError if the server cannot be reached or refuses."""

    def __init__(self, client: QdrantClient, name: str) -> None:
        self.client = client
        self.name = name
        self._label = f"Qdrant collection {name!r}"

    @classmethod
    def at(cls, host: str, port: int, name: str, secure: bool = False, api_key: str | None = None) -> "QdrantEngine":
        # The check of versions would send a request, and warn, before anything was asked for.
        client = QdrantClient(host=host, port=port, https=secure, api_key=api_key, timeout=60, check_compatibility=False)
        return cls(client, name)

    def create(self, about: dict[str, Any]) -> None:
        """Make the collection if there is none; ``about`` (JSON, with ``model_fingerprint``) is kept as its metadata.

        Raises:
            OutputError: it exists and was made with another model, precision, ``top_k`` or ``max_length``, or by an earlier
                version; or the server is older than 1.16 and keeps no metadata.
            OptionError: ``about`` names no fingerprint.
        """
        about = check_about(about)
        if self._ask(self.client.collection_exists, self.name):
            same_model(self._label, self.about(), about)
            return
        vectors = {_VECTOR: models.SparseVectorParams()}
        self._ask(self.client.create_collection, self.name, vectors_config={}, sparse_vectors_config=vectors, metadata=about)
        if not self.about():
            self._ask(self.client.delete_collection, self.name)
            raise OutputError(f"{self._label}: this server keeps no metadata of a collection; update Qdrant to 1.16 or later")
        for field in Tags._fields:
            self._ask(self.client.create_payload_index, self.name, field, models.PayloadSchemaType.KEYWORD)

    def about(self) -> dict[str, Any]:
        """What ``create`` kept; empty if the collection was made otherwise.

        Raises:
            DataError: there is no such collection.
        """
        if not self._ask(self.client.collection_exists, self.name):
            raise DataError(f"{self._label}: does not exist; create it first")
        return dict(self._ask(self.client.get_collection, self.name).config.metadata or {})

    def upload(self, documents: Iterable[EncodedDocument], batch: int = 256, progress: bool = False) -> int:
        """Add documents or replace them by id; those that are there with the same content are not sent again.

        A batch is tried again, at most five times, while the connection fails or the server answers 429 or 503.

        Returns:
            How many were sent.

        Raises:
            DataError: a document cannot be stored, and is named; the batches before it are stored.
        """
        self.about()
        sent = 0
        for part in hashed_batches(documents, batch, progress):
            stored = self._hashes(part)
            points = [
                _point(document, digest) for document, digest in part.values() if stored.get(_point_id(document.id)) != digest
            ]
            if points:
                self._ask(self.client.upsert, self.name, points, wait=True, again=True)
            sent += len(points)
        return sent

    def search(self, terms: np.ndarray, weights: np.ndarray, k: int, filter: Filter | None = None) -> list[Hit]:
        """The k documents of the largest dot product with a query, best first; documents without a shared term are none.

        Args:
            terms: (active dims,) int32, rising.
            weights: (active dims,) float32, above 0.
            filter: metadata that a document must have: ``{"lang": "en"}``, or a list for any of several values; see ``tag``.

        Raises:
            DataError: the query is malformed; or there is a filter, and an earlier version made the collection.
            OptionError: k or the filter is, or no document has a name of the filter.
        """
        terms, weights = check_vector("the query", terms, weights)
        if k < 1:
            raise OptionError(f"k {k}: give 1 or more")
        conditions: list[models.Condition] = [_any_of("values", values) for _, values in check_filter(filter)]
        if not len(terms):
            return []
        found = self._ask(
            self.client.query_points,
            self.name,
            query=models.SparseVector(indices=terms.tolist(), values=weights.tolist()),
            using=_VECTOR,
            query_filter=models.Filter(must=conditions) if conditions else None,
            limit=k,
            with_payload=["id", "title", "text", "metadata"],
        )
        if conditions and not found.points:
            require_tags(self._label, self.about())
            explain_filter(self, filter)
        return [
            Hit(payload["id"], point.score, payload["title"], payload["text"], payload.get("metadata"))
            for point in found.points
            if (payload := point.payload) is not None
        ]

    def has(self, kind: Literal["names", "values"], *conditions: Sequence[str]) -> bool:
        """Whether a document has, for each condition, one of its tags."""
        filter = models.Filter(must=[_any_of(kind, tags) for tags in conditions])
        return bool(self._ask(self.client.count, self.name, filter, exact=True).count)

    def names(self, limit: int) -> list[str]:
        """Names of metadata that documents have, the most frequent first."""
        return [str(hit.value) for hit in self._ask(self.client.facet, self.name, key="names", limit=limit, exact=True).hits]

    def delete(self, ids: Iterable[str]) -> None:
        """Remove documents; ids that are not there are passed over."""
        source: Iterator[models.ExtendedPointId] = map(_point_id, ids)
        while points := list(islice(source, _DELETED_AT_ONCE)):
            self._ask(self.client.delete, self.name, models.PointIdsList(points=points), wait=True, again=True)

    def count(self) -> int:
        return self._ask(self.client.count, self.name, exact=True).count

    def _hashes(self, ids: Iterable[str]) -> dict[Any, str]:
        points = [_point_id(id_) for id_ in ids]
        found = self._ask(self.client.retrieve, self.name, points, with_payload=["hash"], with_vectors=False, again=True)
        return {str(point.id): (point.payload or {}).get("hash", "") for point in found}

    def _ask(self, call: Callable[..., T], *args: Any, again: bool = False, **kwargs: Any) -> T:
        bound = partial(call, *args, **kwargs)
        try:
            return retried(bound, _busy) if again else bound()
        except ResponseHandlingException as error:
            why, fix = str(error.source), "check its address, and that the server runs"
        except UnexpectedResponse as error:
            why, fix = f"{error.status_code} {_reason(error)}", "its log may say more"
            if error.status_code in (401, 403):
                fix = "put the key into the environment as QDRANT_API_KEY"
        except ResourceExhaustedResponse as error:
            why, fix = str(error), "the server is busy; try again later"
        raise AnyspladeError(f"{self._label}: {one_line(why)}; {fix}") from None


def _point(document: EncodedDocument, digest: str) -> models.PointStruct:
    payload = {"id": document.id, **document.content._asdict(), "hash": digest, **tag(document.content.metadata)._asdict()}
    vector = models.SparseVector(indices=document.terms.tolist(), values=document.weights.tolist())
    # A point without a vector is documented; an empty sparse vector is not.
    return models.PointStruct(id=_point_id(document.id), vector={_VECTOR: vector} if len(document.terms) else {}, payload=payload)


def _any_of(kind: str, tags: Sequence[str]) -> models.FieldCondition:
    return models.FieldCondition(key=kind, match=models.MatchAny(any=list(tags)))


def _point_id(id_: str) -> str:
    """Qdrant's ids are whole numbers or UUIDs."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, id_))


def _busy(error: Exception) -> bool:
    if isinstance(error, ResponseHandlingException):
        return isinstance(error.source, httpx.TransportError)
    return isinstance(error, ResourceExhaustedResponse) or getattr(error, "status_code", None) in (429, 503)


def _reason(error: UnexpectedResponse) -> str:
    try:
        return str(error.structured()["status"]["error"])
    except (ValueError, LookupError, TypeError):
        return error.reason_phrase
