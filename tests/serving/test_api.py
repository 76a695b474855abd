import concurrent.futures
import gzip
import http.client
import json
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from starlette.testclient import TestClient

from anysplade import Index, OptionError
from anysplade.serving import api, batching
from anysplade.serving.api import MAX_BODY, MAX_TEXT
from anysplade.serving.app import create_app
from anysplade.serving.batching import Searcher
from servers import http_get, running
from tiny import make_static


def test_the_api_returns_the_results_of_the_index(client, folder):
    results = client.post("/search", json={"query": "kabel locor", "k": 3, "explain": True}).json()
    encoded = client.post("/encode", json={"texts": ["kabel locor", "kabel"]}).json()
    explained = client.post("/explain", json={"query": "kabel locor", "id": results["hits"][0]["id"]}).json()
    filtered = client.post("/search", json={"query": "kabel", "k": 1000, "filter": {"lang": ["en", "de"]}}).json()
    health = client.get("/health").json()
    assert health["status"] == "ok"
    assert health["documents"] == 42
    assert explained["score"] == pytest.approx(results["hits"][0]["score"])
    assert [hit["id"] for hit in filtered["hits"]] == ["<b>&"]
    assert filtered["hits"][0]["metadata"]["odd"] == "\ud800"
    client.__exit__(None, None, None)
    with Index.load(folder) as index:
        expected = index.search("kabel locor", 3, explain=True)
        assert [hit["id"] for hit in results["hits"]] == [hit.id for hit in expected]
        for result, hit in zip(results["hits"], expected, strict=True):
            assert sum(term["product"] for term in result["terms"]) == pytest.approx(hit.score, rel=1e-5)
        assert len(encoded["vectors"]) == 2
        vector = encoded["vectors"][1]
        assert vector["values"] == sorted(vector["values"], reverse=True)
        assert vector["values"][0] > 0
        names = index.queries.term_names
        assert vector["terms"] == [names[term] for term in vector["indices"]]
        row = index.queries.encode(["kabel"])
        found = dict(zip(vector["indices"], vector["values"], strict=True))
        assert found == pytest.approx(dict(zip(row.indices.tolist(), row.data.tolist(), strict=True)), rel=1e-4)
    client.__enter__()


BAD_BODIES = {
    "no JSON": (b"{", 400),
    "no UTF-8": (b'{"query": "\xff\xfe"}', 400),
    "NaN": (b'{"query": "a", "k": NaN}', 400),
    "deep": (b"[" * 100_000, 400),
    "a list": (b"[]", 422),
    "empty": (b"", 400),
    "no query": (b"{}", 422),
    "empty query": (b'{"query": ""}', 422),
    "k of -1": (b'{"query": "a", "k": -1}', 422),
    "k of 0": (b'{"query": "a", "k": 0}', 422),
    "k of 1001": (b'{"query": "a", "k": 1001}', 422),
    "k of 1e400": (b'{"query": "a", "k": 1e400}', 422),
    "k is a string": (b'{"query": "a", "k": "5"}', 422),
    "k is a boolean": (b'{"query": "a", "k": true}', 422),
    "k is a float": (b'{"query": "a", "k": 5.5}', 422),
    "k of 5000 digits": (b'{"query": "a", "k": 1' + b"0" * 5000 + b"}", 400),
    "unknown field": (b'{"query": "a", "size": 5}', 422),
    "long unknown field with a line break": (json.dumps({"query": "a", "\n" + "b" * 1000: 5}).encode(), 422),
    "unknown field that is a lone surrogate": (b'{"query": "a", "\\ud800": 5}', 422),
    "lone surrogate": (b'{"query": "\\ud800"}', 422),
    "long query": (json.dumps({"query": "a" * (MAX_TEXT + 1)}).encode(), 422),
    "a million characters": (json.dumps({"query": "a" * 1_000_000}).encode(), 422),
    "ten megabytes": (b" " * 10 * 2**20, 413),
    "filter by a number that is too large": (b'{"query": "a", "filter": {"x": 1e999}}', 422),
    "filter by too many names": (json.dumps({"query": "a", "filter": {f"x{i}": 1 for i in range(33)}}).encode(), 422),
    "filter by too many values": (json.dumps({"query": "a", "filter": {"x": [1] * 1001}}).encode(), 422),
    "filter by a long name": (json.dumps({"query": "a", "filter": {"x" * 10_001: 1}}).encode(), 422),
    "filter by a long value": (json.dumps({"query": "a", "filter": {"x": ["y" * 10_001]}}).encode(), 422),
    "filter by an empty list": (b'{"query": "a", "filter": {"x": []}}', 422),
    "filter by null": (b'{"query": "a", "filter": null}', 422),
    "filter is a list": (b'{"query": "a", "filter": ["x"]}', 422),
    "filter by an object": (b'{"query": "a", "filter": {"x": {"y": 1}}}', 422),
    "filter by an empty name": (b'{"query": "a", "filter": {"": 1}}', 422),
    "lone surrogate in the name of a filter": (b'{"query": "a", "filter": {"\\ud800": 1}}', 422),
    "lone surrogate in the value of a filter": (b'{"query": "a", "filter": {"x": "\\ud800"}}', 422),
    "lone surrogate in the values of a filter": (b'{"query": "a", "filter": {"x": ["y", "\\ud800"]}}', 422),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_bad_body_gets_a_status_and_one_line(client, name):
    body, status = BAD_BODIES[name]
    response = client.post("/search", content=body, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    assert "\n" not in response.json()["error"]
    assert len(response.json()["error"]) < 400


@pytest.mark.parametrize(
    "body, message",
    [
        ({"query": "a", "k": 0}, "k: Input should be greater than or equal to 1"),
        ({"query": "a", "size": 5}, "the body: no field 'size'; fields: query, k, explain, filter"),
        ({"query": "a", "filter": {"x": None}}, """filter: filter 'x': [None]; give {"name": value} or a list of values"""),
        ({"query": "a", "filter": {"x": [1] * 1001}}, "filter/x/list: List should have at most 1000 items"),
        ({"query": "a", "filter": {"x": [1, "y" * 10_001]}}, "filter/x/list/1/constrained-str: String should have at most 10000"),
        ({"query": "a", "filter": {"x": "y" * 10_001}}, "filter/x/value/constrained-str: String should have at most 10000"),
        ({"query": "a", "filter": {f"x{i}": 1 for i in range(33)}}, "filter: Dictionary should have at most 32 items"),
        ([], "the body: Input should be"),
        ({"query": "a", "filters": {}}, "the body: no field 'filters'; did you mean filter?"),
        ({"query": "", "k": 1}, "query: the query is empty; give a text"),
        ({"query": "\n "}, "query: the query is empty; give a text"),
    ],
)
def test_an_error_names_the_field_and_the_reason(client, body, message):
    assert client.post("/search", json=body).json()["error"].startswith(message)


def test_a_float_without_a_fraction_is_an_integer(client):
    for body in (b'{"query": "kabel", "k": 2.0}', b'{"query": "kabel", "k": 0.2e1}'):
        response = client.post("/search", content=body, headers={"content-type": "application/json"})
        assert len(response.json()["hits"]) == 2


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "x-gzip", "identity, GZIP", "compress"])
@pytest.mark.parametrize("path", ["/search", "/encode", "/explain", "/login"])
def test_a_compressed_body_is_refused(encoding, path, client):
    headers = {"content-type": "application/json", "content-encoding": encoding}
    response = client.post(path, content=gzip.compress(b" " * 10 * MAX_BODY), headers=headers)
    assert (response.status_code, response.headers["accept-encoding"]) == (415, "identity")
    asked = encoding.rpartition(", ")[2].lower()
    assert response.json() == {"error": f"the body is encoded as {asked}; send it as it is, without Content-Encoding"}


def test_a_filter_that_matches_no_document_is_noted(client):
    def search(filter):
        return client.post("/search", json={"query": "kabel", "filter": filter}).json()

    assert search({"lang": "xx"}) == {"query": "kabel", "hits": [], "note": "no document has lang=xx"}
    for name in ("Language", "lang.en", " "):
        found = search({name: 1.5})
        said = f'filter {name.strip().lower()!r}: no document has this name in its "metadata"; names there: lang, odd'
        assert found == {"query": "kabel", "hits": [], "note": said}
    for matching in ({"LANG": " EN "}, {"lang": ["de", "en"]}, {}):
        found = search(matching)
        assert found["hits"]
        assert "note" not in found
    body = {"query": "kabel", "k": 1}
    assert client.post("/search", json=body, headers={"content-encoding": "identity"}).status_code == 200


def test_other_bad_requests(client):
    for method, path, status in (
        ("GET", "/search", 405),
        ("POST", "/health", 405),
        ("GET", "/nowhere", 404),
        ("GET", "/docs", 404),
        ("GET", "/redoc", 404),
        ("GET", "/static/../app.py", 404),
        ("GET", "/static/%2e%2e%2fapp.py", 404),
        ("GET", "/static/page.html", 404),
        ("GET", f"/?q={'a' * (MAX_TEXT + 1)}", 422),
        ("GET", "/?q=a&k=1001", 422),
        ("GET", "/?q=a&k=-1", 422),
        ("GET", "/?q=a&k=²", 422),
    ):
        response = client.request(method, path)
        assert response.status_code == status, (path, response.text)
        assert response.json()["error"]
    assert client.get("/search").json()["error"] == "GET is not possible at /search; send POST"
    assert client.post("/serch", json={}).json()["error"] == "there is no /serch; did you mean /search?"
    assert client.post("/search", content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert client.post("/explain", json={"query": "a", "id": "no such"}).status_code == 404
    assert client.post("/encode", json={"texts": ["a"] * 65}).status_code == 422
    assert client.post("/encode", json={"texts": ["a"], "role": "both"}).status_code == 422


def test_unusual_texts_are_searched(client):
    for text in ("😀😀", "\x00", "a\u202eb", "'; DROP TABLE ids; --", "[MASK] [SEP]", "kabel " * 1600):
        response = client.post("/search", json={"query": text})
        assert response.status_code == 200, text
        assert client.get("/", params={"q": text}).status_code == 200


def test_health_is_503_when_the_index_cannot_be_searched(folder):
    searcher = Searcher(folder)
    with TestClient(create_app(searcher), base_url="http://localhost") as client:
        assert client.get("/health").status_code == 200
        client.portal.call(searcher._loop.cancel)
        for response in (client.get("/health"), client.post("/search", json={"query": "kabel"}), client.get("/cost")):
            assert response.status_code == 503
            assert "start the server again" in response.json()["error"]
        assert client.get("/metrics").status_code == 200


def test_the_openapi_description(client):
    description = client.get("/openapi.json").json()
    assert description["openapi"].startswith("3.1")
    assert set(description["paths"]) == {"/search", "/encode", "/explain", "/health"}
    search = description["paths"]["/search"]["post"]
    assert search["operationId"] == "search"
    assert set(search["responses"]) == {"200", "400", "408", "413", "415", "422", "503"}
    schemas = description["components"]["schemas"]
    assert schemas["SearchRequest"]["properties"]["k"]["maximum"] == 1000
    assert schemas["SearchRequest"]["additionalProperties"] is False
    assert "security" not in description


def test_head_requests(client):
    for path in ("/", "/?q=kabel", "/health", "/metrics", "/openapi.json", "/static/page.css"):
        response = client.head(path)
        assert (response.status_code, response.content) == (200, b""), path


def test_metrics(client):
    client.post("/search", json={"query": "kabel"})
    client.get("/a-path-of-someone-else")
    client.get("/static/page.js")
    text = client.get("/metrics").text
    assert 'anysplade_requests_total{path="/search",status="200"} 1.0' in text
    assert 'anysplade_requests_total{path="other",status="404"} 1.0' in text
    assert 'anysplade_requests_total{path="/static/page.js",status="200"} 1.0' in text
    assert "anysplade_documents 42.0" in text
    assert "anysplade_batch_size_count" in text


def test_too_many_requests_get_503_and_later_ones_are_answered(folder, monkeypatch):
    monkeypatch.setattr(batching, "MAX_WAITING", 2)
    monkeypatch.setattr(batching, "MAX_BATCH", 1)
    with running(folder) as address, concurrent.futures.ThreadPoolExecutor(32) as pool:
        place = urlsplit(address)

        def send(_):
            connection = http.client.HTTPConnection(place.hostname, place.port, timeout=30)
            connection.request("POST", "/search", b'{"query": "kabel"}', {"content-type": "application/json"})
            response = connection.getresponse()
            return response.status, response.headers["retry-after"], response.read()

        responses = list(pool.map(send, range(200)))
        assert {status for status, _, _ in responses} == {200, 503}
        assert all(retry == "1" for status, retry, _ in responses if status == 503)
        assert send(0)[0] == 200


def test_a_slow_client_is_disconnected(folder, monkeypatch):
    monkeypatch.setattr(api, "_BODY_SECONDS", 0.3)
    with running(folder) as address:
        place = urlsplit(address)
        with socket.create_connection((place.hostname, place.port)) as connection:
            connection.sendall(
                b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
            )
            assert b"408" in connection.recv(1000)
        assert http_get(address, "/health")[0] == 200


def test_a_large_body_is_not_read(folder):
    with running(folder) as address:
        place = urlsplit(address)
        with socket.create_connection((place.hostname, place.port)) as connection:
            connection.sendall(
                b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
            )
            chunk = b"%x\r\n" % 2**16 + b" " * 2**16 + b"\r\n"
            for _ in range(MAX_BODY // 2**16 + 1):
                connection.sendall(chunk)
            assert b"413" in connection.recv(1000)


# 413 is added to the statuses that schemathesis takes for a refusal: it also makes bodies larger than the limit.
REFUSALS = "[checks.negative_data_rejection]\nexpected-statuses = [400, 413, 415, 422]\n"


def test_the_server_behaves_as_its_openapi_description(lexical_index, tmp_path):
    """The index has BM25: without it, some values of ``fuse`` are a mistake."""
    (tmp_path / "schemathesis.toml").write_text(REFUSALS)
    program = str(Path(sys.executable).with_name("schemathesis"))
    with running(lexical_index) as address:
        command = [program, "run", f"{address}/openapi.json", "--max-examples", "20", "--generation-deterministic"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=tmp_path)
    assert run.returncode == 0, run.stdout


@pytest.fixture(scope="module")
def lexical_index(tmp_path_factory, collection_folder):
    place = tmp_path_factory.mktemp("lexical")
    Index.build(make_static(place), collection_folder, place / "index", lexical=2).close()
    return place / "index"


def test_bm25_and_a_cross_encoder(lexical_index, teachers):
    query = {"query": "kabel lodan", "k": 3, "explain": True}
    with Index.load(lexical_index) as index:
        expected = [index.search(**query).pop(0), index.search(**query, fuse="wsum").pop(0)]
        depth = index.search(**query, fuse="rrf", rerank=teachers["cross-encoder"], rerank_depth=9).pop(0)
        terms = len(index.term_names)
    with TestClient(create_app(Searcher(lexical_index)), base_url="http://localhost") as client:
        found = [client.post("/search", json=query | options).json()["hits"][0] for options in ({}, {"fuse": "wsum"})]
        assert found == [hit.to_dict() for hit in expected]
        explained = client.post("/explain", json={"query": "kabel lodan", "id": found[0]["id"]}).json()
        assert explained["score"] == pytest.approx(found[0]["score"])
        assert any(term["lexical"] for term in explained["terms"])
        assert f" of {terms}<" in client.get("/cost").text
    searcher = Searcher(lexical_index, fuse="rrf", rerank=teachers["cross-encoder"], rerank_depth=9)
    with TestClient(create_app(searcher), base_url="http://localhost") as client:
        assert client.post("/search", json=query).json()["hits"][0] == depth.to_dict()
        assert client.post("/search", json=query | {"k": 10}).status_code == 422
        page = client.get("/", params={"q": "kabel lodan", "k": 3}).text
        assert "bm25 rank " in page
        assert "&#34;kabel&#34;" in page


def test_fusion_needs_bm25(folder, client):
    answer = client.post("/search", json={"query": "kabel", "fuse": "rrf"})
    assert answer.status_code == 422
    assert "has no stems for BM25" in answer.json()["error"]
    with pytest.raises(OptionError, match="no stems"):
        Searcher(folder.with_name("index"), fuse="rrf")
