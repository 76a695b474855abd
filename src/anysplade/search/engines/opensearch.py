"""OpenSearch: dot products over a ``rank_features`` field, approximate in the weights of documents."""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
from opensearchpy import OpenSearch
from opensearchpy.exceptions import ConnectionError, TransportError

from anysplade.errors import AnyspladeError, DataError, OptionError
from anysplade.search.documents import EncodedDocument, Filter, Hit, check_filter, check_vector, explain_filter, tag
from anysplade.search.engines.sending import check_about, hashed_batches, one_line, require_tags, retried, same_model

T = TypeVar("T")

_MAX_CLAUSES = 1024  # indices.query.bool.max_clause_count; Lucene counts a whole query's, filters too
_MAX_ID = 512  # bytes
_LONG = "sha256:"
_DELETED_AT_ONCE = 1000
_UNSEARCHED = {"type": "keyword", "index": False, "doc_values": False}
_TAG = {"type": "keyword", "ignore_above": 8191}  # characters of up to 4 bytes: Lucene takes 32,766
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


class OpenSearchEngine:
    """An index. Every method raises AnyspladeError if the server cannot be reached or refuses.

    Features are term ids in decimal: a token with a dot would be read as a path. ``rank_features`` keep 9 significant
    bits of a weight and cut the others, so a score is at most 2^-8 (0.4 %) below the dot product.
    """

    def __init__(self, client: OpenSearch, name: str) -> None:
        self.client = client
        self.name = name
        self._label = f"OpenSearch index {name!r}"

    @classmethod
    def at(cls, host: str, port: int, name: str, secure: bool = False, login: tuple[str, str] | None = None) -> "OpenSearchEngine":
        # The client's own retries do not wait.
        client = OpenSearch([{"host": host, "port": port}], use_ssl=secure, http_auth=login, timeout=60, max_retries=0)
        return cls(client, name)

    def create(self, about: dict[str, Any]) -> None:
        """Make the index if there is none; ``about`` (JSON, with ``model_fingerprint``) is kept in its mapping's ``_meta``.

        Raises:
            OutputError: it exists and was made with another model, precision, ``top_k`` or ``max_length``, or by an earlier
                version.
            OptionError: ``about`` names no fingerprint.
        """
        about = check_about(about)
        if self._ask(self.client.indices.exists, index=self.name):
            same_model(self._label, self.about(), about)
            return
        mappings = {"_meta": about, "dynamic": "strict", "properties": _FIELDS}
        self._ask(self.client.indices.create, index=self.name, body={"mappings": mappings})

    def about(self) -> dict[str, Any]:
        """What ``create`` kept; empty if the index was made otherwise.

        Raises:
            DataError: there is no such index.
        """
        if not self._ask(self.client.indices.exists, index=self.name):
            raise DataError(f"{self._label}: does not exist; create it first")
        answer = self._ask(self.client.indices.get_mapping, index=self.name)
        # By the index's own name, which differs if ours is an alias.
        return dict(next(iter(answer.values()))["mappings"].get("_meta", {}))

    def upload(self, documents: Iterable[EncodedDocument], batch: int = 256, progress: bool = False) -> int:
        """Add documents or replace them by id; those that are there with the same content are not sent again.

        A batch is tried again, at most five times, while the connection fails or the server answers 429 or 503, for the
        batch or for a document of it. Search sees the documents when this returns.

        Returns:
            How many were sent.

        Raises:
            DataError: a document cannot be stored, and is named; the batches before it are stored.
        """
        self.about()  # a bulk request would make an index, with a mapping of its own choice
        sent = 0
        for part in hashed_batches(documents, batch, progress):
            stored = self._hashes(part)
            changed = [(document, digest) for document, digest in part.values() if stored.get(_key(document.id)) != digest]
            if changed:
                self._bulk([line for document, digest in changed for line in _lines(document, digest)])
            sent += len(changed)
        self._refresh()
        return sent

    def search(self, terms: np.ndarray, weights: np.ndarray, k: int, filter: Filter | None = None) -> list[Hit]:
        """The k documents of the largest score with a query, best first; documents without a shared term are none.

        Of a query with more than 1,024 terms (the default of ``indices.query.bool.max_clause_count``, from which each
        name in the filter takes one) only those of the largest weights are asked.

        Args:
            terms: (active dims,) int32, rising.
            weights: (active dims,) float32, above 0.
            k: up to 10,000, the default of ``index.max_result_window``.
            filter: metadata that a document must have: ``{"lang": "en"}``, or a list for any of several values; see ``tag``.

        Raises:
            DataError: the query is malformed; or there is a filter, and an earlier version made the index.
            OptionError: k or the filter is, or no document has a name of the filter.
        """
        terms, weights = check_vector("the query", terms, weights)
        if k < 1:
            raise OptionError(f"k {k}: give 1 or more")
        conditions = [{"terms": {"values": values}} for _, values in check_filter(filter)]
        if not len(terms):
            return []
        largest = np.argsort(-weights, kind="stable")[: _MAX_CLAUSES - len(conditions)]
        clauses = [
            {"rank_feature": {"field": f"vector.{term}", "linear": {}, "boost": weight}}
            for term, weight in zip(terms[largest].tolist(), weights[largest].tolist(), strict=True)
        ]
        query = {"bool": {"should": clauses, "minimum_should_match": 1, "filter": conditions}}
        # Without a count of all hits, blocks that cannot reach the first k are skipped.
        body = {"size": k, "query": query, "_source": ["id", "title", "text", "metadata"], "track_total_hits": False}
        answer = self._ask(self.client.search, index=self.name, body=body)
        if conditions and not answer["hits"]["hits"]:
            require_tags(self._label, self.about())
            explain_filter(self, filter)
        return [
            Hit(source["id"], hit["_score"], source["title"], source["text"], source.get("metadata"))
            for hit in answer["hits"]["hits"]
            for source in (hit["_source"],)
        ]

    def has(self, kind: Literal["names", "values"], *conditions: Sequence[str]) -> bool:
        """Whether a document has, for each condition, one of its tags."""
        body = {"query": {"bool": {"filter": [{"terms": {kind: list(tags)}} for tags in conditions]}}}
        return bool(self._ask(self.client.count, index=self.name, body=body)["count"])

    def names(self, limit: int) -> list[str]:
        """Names of metadata that documents have, the most frequent first."""
        body = {"size": 0, "aggs": {"names": {"terms": {"field": "names", "size": limit}}}}
        answer = self._ask(self.client.search, index=self.name, body=body)
        return [bucket["key"] for bucket in answer["aggregations"]["names"]["buckets"]]

    def delete(self, ids: Iterable[str]) -> None:
        """Remove documents; ids that are not there are passed over."""
        lines = ({"delete": {"_id": _key(id_)}} for id_ in ids)
        while part := list(itertools.islice(lines, _DELETED_AT_ONCE)):
            self._bulk(part)
        self._refresh()

    def count(self) -> int:
        return int(self._ask(self.client.count, index=self.name)["count"])

    def _hashes(self, ids: Iterable[str]) -> dict[str, str]:
        body = {"ids": [_key(id_) for id_ in ids]}
        answer = self._ask(self.client.mget, body=body, index=self.name, params={"_source_includes": "hash"}, again=True)
        return {found["_id"]: found["_source"]["hash"] for found in answer["docs"] if found.get("found")}

    def _bulk(self, lines: list[dict[str, Any]]) -> None:
        def send() -> None:
            answer = self.client.bulk(body=lines, index=self.name)
            items = [item for entry in answer["items"] for item in entry.values()]
            failed = [item for item in items if "error" in item]
            # Sent again as a whole, which changes nothing for those that arrived; one that was refused is so for good.
            if failed:
                first = next((item for item in failed if item["status"] not in (429, 503)), failed[0])
                raise TransportError(first["status"], f"document {first['_id'][:80]!r}", {"error": first["error"]})

        self._ask(send, again=True)

    def _refresh(self) -> None:
        self._ask(self.client.indices.refresh, index=self.name, again=True)

    def _ask(self, call: Callable[..., T], *args: Any, again: bool = False, **kwargs: Any) -> T:
        bound = partial(call, *args, **kwargs)
        try:
            return retried(bound, _busy) if again else bound()
        except ConnectionError as error:
            why, fix = str(error.info), "check its address, and that the server runs"
        except TransportError as error:
            why, fix = f"{error.status_code} {error.error}: {_reason(error)}", "its log may say more"
            if error.status_code in (401, 403):
                fix = "give a user and password that may: opensearch://user:password@host:9200/name"
        raise AnyspladeError(f"{self._label}: {one_line(why)}; {fix}") from None


def _lines(document: EncodedDocument, digest: str) -> list[dict[str, Any]]:
    # Lucene refuses weights below float32's normal numbers; they count for nothing.
    kept = document.weights >= np.finfo(np.float32).tiny
    features = zip(map(str, document.terms[kept].tolist()), document.weights[kept].tolist(), strict=True)
    fields = {name: value for name, value in document.content._asdict().items() if value is not None}
    fields |= tag(document.content.metadata)._asdict()
    return [{"index": {"_id": _key(document.id)}}, {"id": document.id, "hash": digest, **fields, "vector": dict(features)}]


def _key(id_: str) -> str:
    """OpenSearch's ids have 1 to 512 bytes; others are hashed, and what looks like a hash too, so that none meet."""
    data = id_.encode()
    return id_ if 0 < len(data) <= _MAX_ID and not id_.startswith(_LONG) else _LONG + hashlib.sha256(data).hexdigest()


def _busy(error: Exception) -> bool:
    return isinstance(error, TransportError) and (isinstance(error, ConnectionError) or error.status_code in (429, 503))


def _reason(error: TransportError) -> str:
    cause = error.info.get("error") if isinstance(error.info, dict) else error.info
    return str(cause.get("reason", cause) if isinstance(cause, dict) else cause)
