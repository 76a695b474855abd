"""OpenSearch: dot products over a ``rank_features`` field, approximate in the weights of documents."""

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from opensearchpy import OpenSearch
from opensearchpy.exceptions import ConnectionError, TransportError

from anysplade.search.documents import EncodedDocument
from anysplade.search.engines.base import BUSY, SHOWN, ServerEngine
from anysplade.search.filters import Tags

_MAX_CLAUSES = 1024  # default of indices.query.bool.max_clause_count; Lucene counts the whole query, filters included
_MAX_ID = 512  # bytes
_HASHED = "sha256:"  # prefix of ids that are hashes
_UNSEARCHED = {"type": "keyword", "index": False, "doc_values": False}
_TAG = {"type": "keyword", "ignore_above": 8191}  # characters of up to 4 bytes: Lucene accepts 32,766 bytes
_FIELDS = {
    "id": _UNSEARCHED,
    "hash": _UNSEARCHED,
    "title": {"type": "text", "index": False},
    "text": {"type": "text", "index": False},
    "metadata": {"type": "object", "enabled": False},
    "names": _TAG,
    "values": _TAG,
    "vector": {"type": "rank_features"},
}


class OpenSearchEngine(ServerEngine):
    """An index on an OpenSearch server. Every method raises AnyspladeError if the server cannot be reached or refuses.

    Features are term ids in decimal, because a dot in a token would be read as a path. ``rank_features`` keep 9 significant bits of
    a weight and cut the rest, so a score is at most 2^-8 (0.4 %) below the dot product. A query uses at most 1,024 terms, less one
    per name in the filter: those with the largest weights. ``k`` is at most 10,000, the default of ``index.max_result_window``.
    """

    errors = (TransportError,)
    login = "give a user and password that may: opensearch://user:password@host:9200/name"

    def __init__(self, client: OpenSearch, name: str) -> None:
        super().__init__(client, name, f"OpenSearch index {name!r}")

    @classmethod
    def at(cls, host: str, port: int, name: str, secure: bool = False, login: tuple[str, str] | None = None) -> "OpenSearchEngine":
        # The client's own retries follow without a pause.
        client = OpenSearch([{"host": host, "port": port}], use_ssl=secure, http_auth=login, timeout=60, max_retries=0)
        return cls(client, name)

    def count(self) -> int:
        return int(self.ask(self.client.count, index=self.name)["count"])

    def has(self, kind: Literal["names", "values"], *conditions: Sequence[str]) -> bool:
        body = {"query": {"bool": {"filter": [{"terms": {kind: list(tags)}} for tags in conditions]}}}
        return bool(self.ask(self.client.count, index=self.name, body=body)["count"])

    def names(self, limit: int) -> list[str]:
        body = {"size": 0, "aggs": {"names": {"terms": {"field": "names", "size": limit}}}}
        answer = self.ask(self.client.search, index=self.name, body=body)
        return [bucket["key"] for bucket in answer["aggregations"]["names"]["buckets"]]

    @staticmethod
    def key(id_: str) -> str:
        data = id_.encode()
        if 0 < len(data) <= _MAX_ID and not id_.startswith(_HASHED):  # an id that looks like a hash could equal one
            return id_
        return _HASHED + hashlib.sha256(data).hexdigest()

    def _create(self, about: dict[str, Any]) -> None:
        mappings = {"_meta": about, "dynamic": "strict", "properties": _FIELDS}
        self.ask(self.client.indices.create, index=self.name, body={"mappings": mappings})

    def _about(self) -> dict[str, Any] | None:
        if not self.ask(self.client.indices.exists, index=self.name):
            return None
        answer = self.ask(self.client.indices.get_mapping, index=self.name)
        (index,) = answer.values()  # its key is not our name if that is an alias
        return dict(index["mappings"].get("_meta", {}))

    def _stored_hashes(self, keys: list[str]) -> dict[str, str]:
        answer = self.ask(self.client.mget, body={"ids": keys}, index=self.name, params={"_source_includes": "hash"}, again=True)
        return {found["_id"]: found["_source"]["hash"] for found in answer["docs"] if found.get("found")}

    def _send(self, documents: list[tuple[EncodedDocument, dict[str, Any]]]) -> None:
        lines = []
        for (id_, _, terms, weights), payload in documents:
            kept = weights >= np.finfo(np.float32).tiny  # Lucene refuses subnormal weights, which add nothing to a score
            vector = dict(zip(map(str, terms[kept].tolist()), weights[kept].tolist(), strict=True))
            lines += [{"index": {"_id": self.key(id_)}}, payload | {"vector": vector}]
        self._bulk(lines)

    def _search(self, terms: np.ndarray, weights: np.ndarray, k: int, conditions: Sequence[Tags]) -> list[tuple[float, Any]]:
        largest = np.argsort(-weights, kind="stable")[: _MAX_CLAUSES - len(conditions)]
        clauses = [
            {"rank_feature": {"field": f"vector.{term}", "linear": {}, "boost": weight}}
            for term, weight in zip(terms[largest].tolist(), weights[largest].tolist(), strict=True)
        ]
        filters = [{"terms": {"values": values}} for _, values in conditions]
        query = {"bool": {"should": clauses, "minimum_should_match": 1, "filter": filters}}
        # Unless all hits are counted, Lucene skips blocks that cannot reach the first k.
        body = {"size": k, "query": query, "_source": SHOWN, "track_total_hits": False}
        hits = self.ask(self.client.search, index=self.name, body=body)["hits"]["hits"]
        return [(hit["_score"], hit["_source"]) for hit in hits]

    def _delete(self, keys: list[str]) -> None:
        self._bulk([{"delete": {"_id": key}} for key in keys])

    def _bulk(self, lines: list[dict[str, Any]]) -> None:
        def send() -> None:
            answer = self.client.bulk(body=lines, index=self.name)
            failed = [item for entry in answer["items"] for item in entry.values() if "error" in item]
            if failed:  # a retry sends all again, which changes nothing for those that arrived; a refusal is not retried
                first = next((item for item in failed if item["status"] not in BUSY), failed[0])
                raise TransportError(first["status"], f"document {first['_id'][:80]!r}", {"error": first["error"]})

        self.ask(send, again=True)

    def _refresh(self) -> None:
        self.ask(self.client.indices.refresh, index=self.name, again=True)

    def _explain(self, error: Any) -> tuple[str, int | None]:
        if isinstance(error, ConnectionError):
            return str(error.info), None
        cause = error.info.get("error") if isinstance(error.info, dict) else error.info
        reason = cause.get("reason", cause) if isinstance(cause, dict) else cause
        return f"{error.status_code} {error.error}: {reason}", error.status_code
