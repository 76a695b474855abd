"""Qdrant, as a server or a cluster: exact dot products over a named sparse vector."""

import uuid
from collections.abc import Sequence
from typing import Any, Literal

import httpx
import numpy as np
from qdrant_client import QdrantClient, models
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from anysplade.errors import OutputError
from anysplade.search.documents import EncodedDocument
from anysplade.search.engines.base import SHOWN, ServerEngine
from anysplade.search.filters import Tags

_VECTOR = "splade"


class QdrantEngine(ServerEngine):
    """A collection on a Qdrant server. Every method raises AnyspladeError if the server cannot be reached or refuses."""

    errors = (ResponseHandlingException, UnexpectedResponse, ResourceExhaustedResponse)
    login = "put the key into the environment as QDRANT_API_KEY"

    def __init__(self, client: QdrantClient, name: str) -> None:
        super().__init__(client, name, f"Qdrant collection {name!r}")

    @classmethod
    def at(cls, host: str, port: int, name: str, secure: bool = False, api_key: str | None = None) -> "QdrantEngine":
        # The client's check of versions would send a request at once.
        client = QdrantClient(host=host, port=port, https=secure, api_key=api_key, timeout=60, check_compatibility=False)
        return cls(client, name)

    def count(self) -> int:
        return self.ask(self.client.count, self.name, exact=True).count

    def has(self, kind: Literal["names", "values"], *conditions: Sequence[str]) -> bool:
        return bool(self.ask(self.client.count, self.name, _filter(kind, conditions), exact=True).count)

    def names(self, limit: int) -> list[str]:
        return [str(hit.value) for hit in self.ask(self.client.facet, self.name, key="names", limit=limit, exact=True).hits]

    @staticmethod
    def key(id_: str) -> str:
        return str(uuid.uuid5(uuid.NAMESPACE_OID, id_))  # Qdrant accepts integers and UUIDs

    def _create(self, about: dict[str, Any]) -> None:
        vectors = {_VECTOR: models.SparseVectorParams()}
        self.ask(self.client.create_collection, self.name, vectors_config={}, sparse_vectors_config=vectors, metadata=about)
        if not self._about():
            self.ask(self.client.delete_collection, self.name)
            raise OutputError(f"{self.label}: this server keeps no metadata of a collection; update Qdrant to 1.16 or later")
        for field in Tags._fields:
            self.ask(self.client.create_payload_index, self.name, field, models.PayloadSchemaType.KEYWORD)

    def _about(self) -> dict[str, Any] | None:
        if not self.ask(self.client.collection_exists, self.name):
            return None
        return dict(self.ask(self.client.get_collection, self.name).config.metadata or {})

    def _stored_hashes(self, keys: list[str]) -> dict[str, str]:
        found = self.ask(self.client.retrieve, self.name, keys, with_payload=["hash"], with_vectors=False, again=True)
        return {str(point.id): (point.payload or {}).get("hash", "") for point in found}

    def _send(self, documents: list[tuple[EncodedDocument, dict[str, Any]]]) -> None:
        points = []
        for (id_, _, terms, weights), payload in documents:
            # Qdrant documents points without a vector, but not empty sparse vectors.
            vectors: Any = {_VECTOR: models.SparseVector(indices=terms.tolist(), values=weights.tolist())} if len(terms) else {}
            points.append(models.PointStruct(id=self.key(id_), vector=vectors, payload=payload))
        self.ask(self.client.upsert, self.name, points, wait=True, again=True)

    def _search(self, terms: np.ndarray, weights: np.ndarray, k: int, conditions: Sequence[Tags]) -> list[tuple[float, Any]]:
        found = self.ask(
            self.client.query_points,
            self.name,
            query=models.SparseVector(indices=terms.tolist(), values=weights.tolist()),
            using=_VECTOR,
            query_filter=_filter("values", [values for _, values in conditions]) if conditions else None,
            limit=k,
            with_payload=SHOWN,
        )
        return [(point.score, point.payload) for point in found.points]

    def _delete(self, keys: list[str]) -> None:
        self.ask(self.client.delete, self.name, models.PointIdsList(points=list(keys)), wait=True, again=True)

    def _refresh(self) -> None:
        """Every change has waited for that already."""

    def _explain(self, error: Any) -> tuple[str, int | None]:
        if isinstance(error, ResponseHandlingException):
            return str(error.source), None if isinstance(error.source, httpx.TransportError) else 200
        if isinstance(error, ResourceExhaustedResponse):
            return str(error), 429
        try:
            reason = str(error.structured()["status"]["error"])
        except (ValueError, LookupError, TypeError):
            reason = error.reason_phrase
        return f"{error.status_code} {reason}", error.status_code


def _filter(kind: str, conditions: Sequence[Sequence[str]]) -> models.Filter:
    """Points that have at least one of the tags of each condition."""
    return models.Filter(must=[models.FieldCondition(key=kind, match=models.MatchAny(any=list(tags))) for tags in conditions])
