"""An HTTP server that answers as OpenSearch, for tests that need real sockets."""

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest


class RefusedError(Exception):
    def __init__(self, status, kind, reason):
        self.status, self.answer = status, {"error": {"type": kind, "reason": reason, "root_cause": []}, "status": status}


def require(condition, reason):
    if not condition:
        raise RefusedError(400, "illegal_argument_exception", str(reason))


class Index:
    """What OpenSearch does with an index's requests, as its documentation and Lucene's FeatureField have it."""

    def __init__(self, mappings):
        require(set(mappings) <= {"_meta", "dynamic", "properties"}, mappings)
        for field in mappings["properties"].values():
            require(field["type"] in {"keyword", "text", "object", "rank_features"}, field)
            options = {"object": {"enabled"}, "keyword": {"index", "doc_values", "ignore_above"}}
            require(set(field) <= {"type", "index"} | options.get(field["type"], set()), field)
        self.mappings, self.documents, self.visible = mappings, {}, {}

    def store(self, key, source):
        require(0 < len(key.encode()) <= 512, f"id is too long, must be no longer than 512 bytes but was: {len(key)}")
        fields = self.mappings["properties"]
        if unknown := set(source) - set(fields):
            raise RefusedError(400, "strict_dynamic_mapping_exception", f"dynamic introduction of {unknown}")
        for name, value in source.items():
            kind = fields[name]["type"]
            texts = value if isinstance(value, list) else [value]
            expected = str if kind in ("keyword", "text") else dict
            require(all(isinstance(text, expected) for text in texts), f"failed to parse field [{name}]")
            require(kind != "keyword" or all(len(text.encode()) <= 32_766 for text in self.terms(name, value)), "immense term")
            if kind == "rank_features":
                for feature, weight in value.items():
                    require("." not in feature and isinstance(weight, float), feature)
                    require(np.float32(weight) >= np.finfo(np.float32).tiny, "featureValue must be a positive normal float")
        self.documents[key] = source

    def terms(self, field, value):
        """What a keyword field is searched by."""
        longest = self.mappings["properties"][field].get("ignore_above", 2**31)
        return {text for text in (value if isinstance(value, list) else [value]) if len(text) <= longest}

    def has(self, source, condition):
        ((field, texts),) = condition["terms"].items()
        require(field in ("names", "values") and isinstance(texts, list), condition)
        return not self.terms(field, source[field]).isdisjoint(texts)

    def search(self, body):
        if "aggs" in body:
            require(set(body) == {"aggs", "size"} and body["size"] == 0, body)
            ((name, asked),) = body["aggs"].items()
            counts = Counter(text for source in self.visible.values() for text in source[asked["terms"]["field"]])
            buckets = [{"key": key, "doc_count": count} for key, count in counts.most_common(asked["terms"]["size"])]
            return {"took": 1, "timed_out": False, "hits": {"hits": []}, "aggregations": {name: {"buckets": buckets}}}
        require(set(body) == {"size", "query", "_source", "track_total_hits"} and body["size"] <= 10_000, body)
        query = body["query"]["bool"]
        require(set(query) == {"should", "minimum_should_match", "filter"} and query["minimum_should_match"] == 1, query)
        if len(query["should"]) + len(query["filter"]) > 1024:
            raise RefusedError(
                400, "too_many_nested_clauses", "Query contains too many nested clauses; maxClauseCount is set to 1024"
            )
        found = []
        for key, source in self.visible.items():
            if all(self.has(source, condition) for condition in query["filter"]):
                parts = [_linear(source, clause) for clause in query["should"]]
                if any(part is not None for part in parts):
                    found.append((sum(part for part in parts if part is not None), key, source))
        found.sort(key=lambda hit: -hit[0])
        hits = [
            {"_index": "x", "_id": key, "_score": score, "_source": {k: v for k, v in source.items() if k in body["_source"]}}
            for score, key, source in found[: body["size"]]
        ]
        return {"took": 1, "timed_out": False, "hits": {"max_score": hits[0]["_score"] if hits else None, "hits": hits}}


def _linear(source, clause):
    (feature,) = clause.values()
    require(set(clause) == {"rank_feature"} and set(feature) == {"field", "linear", "boost"} and feature["linear"] == {}, clause)
    parent, _, name = feature["field"].rpartition(".")
    require(parent == "vector" and feature["boost"] > 0, clause)
    if name not in source["vector"]:
        return None
    # FeatureField: the float's upper 17 bits, of which sign and exponent are 9, become the term frequency.
    bits = np.float32(source["vector"][name]).view(np.uint32) >> np.uint32(15) << np.uint32(15)
    return float(bits.view(np.float32)) * feature["boost"]


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.indices, self.requests, self.faults = {}, [], []  # faults: (end of the path, status or item error)

    def answer(self, method, path, query, body):
        parts = [unquote(part) for part in path.strip("/").split("/")]
        name, verb = parts[0], parts[1] if len(parts) > 1 else ""
        fault = next((fault for fault in self.faults if path.endswith(fault[0])), None)
        if fault:
            self.faults.remove(fault)
            if isinstance(fault[1], int):
                raise RefusedError(fault[1], "rejected_execution_exception", "too many requests")
        if (method, verb) == ("PUT", ""):
            if name in self.indices:
                raise RefusedError(400, "resource_already_exists_exception", f"index [{name}] already exists")
            self.indices[name] = Index(json.loads(body)["mappings"])
            return {"acknowledged": True, "shards_acknowledged": True, "index": name}
        if name not in self.indices:
            raise RefusedError(404, "index_not_found_exception", f"no such index [{name}]")
        index = self.indices[name]
        match method, verb:
            case "HEAD", "":
                return {}
            case "GET", "_mapping":
                return {name: {"mappings": index.mappings}}
            case "POST", "_mget":
                require(query == {"_source_includes": ["hash"]}, query)
                docs = []
                for key in json.loads(body)["ids"]:
                    found = index.documents.get(key)
                    source = {} if found is None else {"_source": {"hash": found["hash"]}}
                    docs.append({"_index": name, "_id": key, "found": found is not None, **source})
                return {"docs": docs}
            case "POST", "_bulk":
                return self.bulk(index, body, fault and fault[1])
            case "POST", "_refresh":
                index.visible = dict(index.documents)
                return {"_shards": {"total": 2, "successful": 1, "failed": 0}}
            case "POST", "_search":
                return index.search(json.loads(body))
            case (("POST" | "GET"), "_count"):
                asked = json.loads(body)["query"] if body else None
                conditions = [] if asked is None else asked["bool"]["filter"]
                return {"count": sum(all(index.has(source, one) for one in conditions) for source in index.visible.values())}
        raise RefusedError(405, "method_not_allowed", f"{method} {path}")

    def bulk(self, index, body, fault):
        require(body.endswith("\n"), "The bulk request must be terminated by a newline [\\n]")
        lines, items = iter(body[:-1].split("\n")), []
        for line in lines:
            ((action, about),) = json.loads(line).items()
            item = {"_index": "x", "_id": about["_id"], "status": 200}
            try:
                if fault and not items:
                    raise RefusedError(*fault)
                if action == "delete":
                    item["status"] = 200 if index.documents.pop(about["_id"], None) else 404
                else:
                    require(action == "index", action)
                    index.store(about["_id"], json.loads(next(lines)))
            except RefusedError as refused:
                item |= {"status": refused.status, "error": refused.answer["error"]}
                if fault and not items and action == "index":
                    next(lines)
            items.append({action: item})
        return {"took": 1, "errors": any("error" in item for entry in items for item in entry.values()), "items": items}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        url = urlsplit(self.path)
        self.server.requests.append((self.command, url.path, body))
        try:
            status, answer = 200, self.server.answer(self.command, url.path, parse_qs(url.query), body)
        except RefusedError as refused:
            status, answer = refused.status, refused.answer
        data = b"" if self.command == "HEAD" else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(server):
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
