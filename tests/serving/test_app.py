import asyncio
import concurrent.futures
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from starlette.testclient import TestClient

from anysplade import Document, Index
from anysplade.cli import main
from anysplade.errors import AnyspladeError
from anysplade.model.encoding import encode
from anysplade.model.probe import PROBE_QUERIES
from anysplade.search.store import Store
from anysplade.serving import app as serve
from anysplade.serving import batching as searcher
from anysplade.serving.app import MAX_BODY, MAX_TEXT, create_app
from anysplade.serving.batching import Searcher
from servers import running
from tiny import make_backbone, make_collection

HOSTILE = '<script>alert("kabel")</script> kabel <img src=x onerror=alert(1)> kabel'
TOKEN = "a-token-of-some-length"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("serve")
    make_backbone("bert", place / "model")
    make_collection(place / "collection")
    with Index.build(place / "model", place / "collection", place / "index") as index:
        index.add({"<b>&": Document("<i>title</i>", HOSTILE, {"lang": "en", "odd": "\ud800"})})
        index.add({"half \ud800": Document("", "kabel kabel")})
    return place / "index"


@pytest.fixture
def client(folder):
    with TestClient(create_app(Searcher(folder, "bm25")), base_url="http://localhost") as client:
        yield client


def test_the_api_answers_what_the_index_does(client, folder):
    found = client.post("/search", json={"query": "kabel locor", "k": 3, "explain": True}).json()
    encoded = client.post("/encode", json={"texts": ["kabel locor", "kabel"]}).json()
    one = client.post("/explain", json={"query": "kabel locor", "id": found["hits"][0]["id"]}).json()
    filtered = client.post("/search", json={"query": "kabel", "k": 1000, "filter": {"lang": ["en", "de"]}}).json()
    health = client.get("/health").json()
    assert health["status"] == "ok"
    assert health["documents"] == 42
    assert one["score"] == pytest.approx(found["hits"][0]["score"])
    assert [hit["id"] for hit in filtered["hits"]] == ["<b>&"]
    assert filtered["hits"][0]["metadata"]["odd"] == "\ud800"
    client.__exit__(None, None, None)
    with Index.load(folder) as index:
        expected = index.search("kabel locor", 3, explain=True)
        assert [hit["id"] for hit in found["hits"]] == [hit.id for hit in expected]
        for got, hit in zip(found["hits"], expected, strict=True):
            assert sum(term["product"] for term in got["terms"]) == pytest.approx(hit.score, rel=1e-5)
        assert len(encoded["vectors"]) == 2
        assert max(encoded["vectors"][1].values()) > 0
    client.__enter__()


def test_a_head_that_is_wider_than_the_vocabulary(tmp_path):
    backbone = make_backbone("bert", tmp_path / "padded", vocab_size=160)
    with Index.build(backbone, make_collection(tmp_path / "collection"), tmp_path / "index") as index:
        row = index.search("kabel locor", 1, explain=True)
        encoded = encode(index.encoder, ["kabel locor"], "query")
    with TestClient(create_app(Searcher(tmp_path / "index")), base_url="http://localhost") as client:
        found = client.post("/search", json={"query": "kabel locor", "k": 1, "explain": True}).json()["hits"]
        (vector,) = client.post("/encode", json={"texts": ["kabel locor"]}).json()["vectors"]
        pages = [client.get(path) for path in ("/?q=kabel+locor", "/inspect?text=kabel+locor", "/cost", "/head")]
    assert [term["term"] for term in found[0]["terms"]] == [term.term for term in row[0].terms]
    assert sorted(vector.values()) == pytest.approx(sorted(encoded.data.tolist()), rel=1e-5)
    assert [page.status_code for page in pages] == [200] * 4
    assert "[term:15" in pages[1].text
    assert all(">None<" not in page.text for page in pages)


MISTAKES = {
    "no json": (b"{", 400),
    "no utf-8": (b'{"query": "\xff\xfe"}', 400),
    "nan": (b'{"query": "a", "k": NaN}', 400),
    "deep": (b"[" * 100_000, 400),
    "a list": (b"[]", 422),
    "empty": (b"", 400),
    "no query": (b"{}", 422),
    "empty query": (b'{"query": ""}', 422),
    "k of -1": (b'{"query": "a", "k": -1}', 422),
    "k of 0": (b'{"query": "a", "k": 0}', 422),
    "k of 1001": (b'{"query": "a", "k": 1001}', 422),
    "k of 1e400": (b'{"query": "a", "k": 1e400}', 422),
    "k a text": (b'{"query": "a", "k": "5"}', 422),
    "k a truth value": (b'{"query": "a", "k": true}', 422),
    "unknown": (b'{"query": "a", "size": 5}', 422),
    "half a character": (b'{"query": "\\ud800"}', 422),
    "long query": (json.dumps({"query": "a" * (MAX_TEXT + 1)}).encode(), 422),
    "a million characters": (json.dumps({"query": "a" * 1_000_000}).encode(), 422),
    "ten megabytes": (b" " * 10 * 2**20, 413),
    "odd filter": (b'{"query": "a", "filter": {"x": 1.5}}', 422),
    "empty filter": (b'{"query": "a", "filter": {"x": []}}', 422),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_have_a_status_and_a_line(client, name):
    body, status = MISTAKES[name]
    answer = client.post("/search", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert "\n" not in answer.json()["error"]
    assert len(answer.json()["error"]) < 400


def test_other_mistakes(client):
    for method, path, status in (
        ("GET", "/search", 405),
        ("POST", "/health", 405),
        ("GET", "/nowhere", 404),
        ("GET", "/static/../serve.py", 404),
        ("GET", "/static/%2e%2e%2fserve.py", 404),
        ("GET", "/static/page.html", 404),
        ("GET", f"/?q={'a' * (MAX_TEXT + 1)}", 422),
        ("GET", "/?q=a&k=1001", 422),
        ("GET", "/?q=a&k=-1", 422),
        ("GET", "/?q=a&k=²", 422),
    ):
        answer = client.request(method, path)
        assert answer.status_code == status, (path, answer.text)
        assert answer.json()["error"]
    assert client.post("/search", content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert client.post("/explain", json={"query": "a", "id": "no such"}).status_code == 404
    assert client.post("/encode", json={"texts": ["a"] * 65}).status_code == 422
    assert client.post("/encode", json={"texts": ["a"], "role": "both"}).status_code == 422


def test_odd_texts_are_searched(client):
    for text in (" ", "😀😀", "\x00", "a\u202eb", "'; DROP TABLE ids; --", "\n\n", "[MASK] [SEP]", "kabel " * 1600):
        answer = client.post("/search", json={"query": text})
        assert answer.status_code == 200, text
        assert client.get("/", params={"q": text}).status_code == 200


def test_hostile_documents_stay_text(client):
    for path in ("/?q=kabel&k=50", "/results?q=kabel&k=50", "/compare?q=kabel", "/inspect?text=<script>x</script>"):
        page = client.get(path)
        assert page.status_code == 200
        assert len(re.findall(r"<script", page.text)) == ("results" not in path)  # our own, in the head
        assert "<i>title" not in page.text
        assert "<img src=x" not in page.text
    assert "&lt;i&gt;title" in client.get("/?q=kabel&k=50").text


def test_ids_with_half_a_character_are_shown(client):
    for path in ("/?q=kabel&k=50", "/results?q=kabel&k=50", "/compare?q=kabel"):
        page = client.get(path)
        assert page.status_code == 200
        assert "half ?" in page.text
    hits = client.post("/search", json={"query": "kabel", "k": 50}).json()["hits"]
    assert "half \ud800" in [hit["id"] for hit in hits]


def test_a_login_where_none_is_asked_for(client):
    for form in (b"token=\xff\xfe", b"token=%ff%0d%0aSet-Cookie:x", b"token=x", b""):
        answer = client.post("/login", content=form, follow_redirects=False)
        assert answer.status_code == 303
        assert "set-cookie" not in answer.headers


def test_a_failure_of_the_server_is_said_in_its_log_alone(client, monkeypatch, caplog):
    def fail(*_):
        raise AnyspladeError("/a/folder: the disk is full")

    monkeypatch.setattr(Index, "search_vector", fail)
    answer = client.post("/search", json={"query": "kabel"})
    assert (answer.status_code, answer.json()) == (500, {"error": "the server failed; its log says why"})
    assert "/search: /a/folder: the disk is full" in caplog.text


def test_headers_of_every_answer(client):
    for path in ("/", "/health", "/static/page.js", "/nowhere", "/head.svg"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
    text = client.get("/?q=kabel").text
    assert not re.search(r"\son\w+=|<style|style=|javascript:|https?://", text)


def test_another_name_for_this_machine_is_refused(folder):
    with TestClient(create_app(Searcher(folder)), base_url="http://evil.example") as client:
        assert client.get("/health").status_code == 400


def test_a_token_is_asked_for(folder):
    with TestClient(create_app(Searcher(folder), TOKEN, None), base_url="https://search.example") as client:
        assert client.get("/health").status_code == 401
        assert client.get("/metrics").status_code == 401
        assert client.get("/nowhere").status_code == 401
        for given in ("Bearer wrong", f"Basic {TOKEN}", "Bearer ", f"Bearer {TOKEN}x", "Bearer é"):
            assert client.get("/health", headers=[(b"authorization", given.encode())]).status_code == 401
        assert client.get("/health", headers={"authorization": f"Bearer {TOKEN}"}).json()["status"] == "ok"
        page = client.get("/", headers={"accept": "text/html"})
        assert page.url.path == "/login"
        assert "wants a token" in page.text
        assert client.post("/login", data={"token": "wrong"}).status_code == 401
        assert client.post("/login", data={"token": TOKEN}).url.path == "/"
        cookie = next(iter(client.cookies.jar))
        assert cookie.secure
        assert cookie.has_nonstandard_attr("HttpOnly")
        assert client.get("/?q=kabel").status_code == 200
        assert client.get("/openapi.json").json()["security"] == [{"token": []}]


def test_metrics(client):
    client.post("/search", json={"query": "kabel"})
    client.get("/a-path-of-someone-else")
    text = client.get("/metrics").text
    assert 'anysplade_requests_total{path="/search",status="200"} 1.0' in text
    assert 'anysplade_requests_total{path="other",status="404"} 1.0' in text
    assert "anysplade_documents 42.0" in text
    assert "anysplade_batch_size_count" in text


def test_requests_are_answered_while_the_cost_is_counted(folder, monkeypatch):
    reached, go, items, passes = threading.Event(), threading.Event(), Store.items, []

    def slowly(self):
        passes.append(self)
        for item in items(self):
            reached.set()
            assert go.wait(60)
            yield item

    monkeypatch.setattr(Store, "items", slowly)
    with running(folder) as address, concurrent.futures.ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(http_get, address, "/cost") for _ in range(3)]
        try:
            assert reached.wait(30)
            for path in ("/?q=kabel", "/results?q=kabel", "/inspect?text=kabel", "/health", "/metrics", "/openapi.json"):
                assert http_get(address, path)[0] == 200
            assert not any(one.done() for one in asked)
        finally:
            go.set()
        pages = {one.result() for one in asked}
    assert len(passes) == 1
    assert len(pages) == 1
    ((status, page),) = pages
    with Index.load(folder) as index:
        documents = list(index.store)
        rows = encode(index.encoder, list(PROBE_QUERIES), "query")
    postings = sum(len(document.terms) for document in documents)
    frequency = np.bincount(np.concatenate([document.terms for document in documents]), minlength=rows.shape[1])
    touched = np.mean([frequency[row.indices].sum() for row in rows])
    assert status == 200
    for value in (f"{len(documents)}", f"{postings:,}", f"{touched:,.0f}", f"{postings / len(documents):.1f}"):
        assert f"<td>{value}</td>" in page.decode()


def test_health_says_when_nothing_is_searched_any_more(folder):
    served = Searcher(folder)
    with TestClient(create_app(served), base_url="http://localhost") as client:
        assert client.get("/health").status_code == 200
        client.portal.call(served._loop.cancel)
        for answer in (client.get("/health"), client.post("/search", json={"query": "kabel"}), client.get("/cost")):
            assert answer.status_code == 503
            assert "start the server again" in answer.json()["error"]
        assert client.get("/metrics").status_code == 200


def test_too_many_requests_get_503_and_then_it_goes_on(folder, monkeypatch):
    monkeypatch.setattr(searcher, "WAITING", 2)
    monkeypatch.setattr(searcher, "BATCH", 1)
    with running(folder) as address, concurrent.futures.ThreadPoolExecutor(32) as pool:
        place = urlsplit(address)

        def ask(_):
            connection = http.client.HTTPConnection(place.hostname, place.port, timeout=30)
            connection.request("POST", "/search", b'{"query": "kabel"}', {"content-type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.headers["retry-after"], answer.read()

        answers = list(pool.map(ask, range(200)))
        assert {status for status, _, _ in answers} == {200, 503}
        assert all(retry == "1" for status, retry, _ in answers if status == 503)
        assert ask(0)[0] == 200


def test_a_slow_client_is_let_go(folder, monkeypatch):
    monkeypatch.setattr(serve, "_BODY_SECONDS", 0.3)
    with running(folder) as address:
        place = urlsplit(address)
        with socket.create_connection((place.hostname, place.port)) as connection:
            connection.sendall(
                b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
            )
            assert b"408" in connection.recv(1000)
        assert http_get(address, "/health")[0] == 200


def http_get(address, path):
    place = urlsplit(address)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=30)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_a_body_that_is_too_large_is_not_read(folder):
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


def test_what_the_description_says_is_so(folder, tmp_path):
    with running(folder) as address:
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{address}/openapi.json", "--max-examples", "20"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=tmp_path)
    assert found.returncode == 0, found.stdout


def start(folder, *more):
    code = "import sys; from anysplade.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = [sys.executable, "-c", code, "serve", str(folder), "--port", "0", *more]
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    for line in process.stderr:
        found = re.search(r"at (http://\S+)", line)
        if found:
            return process, found[1]
    raise AssertionError(process.wait())


def test_the_command_serves_until_it_is_stopped(folder):
    process, address = start(folder, "--json")
    assert http_get(address, "/health")[0] == 200
    assert main(["serve", str(folder), "--port", str(urlsplit(address).port)]) == 2
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert json.loads(out) == {"index": str(folder), "address": address, "requests": 1}


def test_requests_under_way_are_answered_before_it_stops(folder, monkeypatch):
    work = Searcher._work

    def slowly(self, jobs):
        time.sleep(0.5)
        return work(self, jobs)

    monkeypatch.setattr(Searcher, "_work", slowly)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with running(folder) as address:
            asked = pool.submit(http_get, address, "/?q=kabel")
            time.sleep(0.2)
        assert asked.result()[0] == 200


def test_a_request_that_is_given_up_when_the_server_stops_is_told(folder, monkeypatch):
    reached, go, work, sent = threading.Event(), threading.Event(), Searcher._work, []
    monkeypatch.setattr(Searcher, "_work", lambda self, jobs: (reached.set(), go.wait(60), work(self, jobs))[2])

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    async def stopped():
        served = Searcher(folder)
        app = create_app(served, hosts=None)
        served.start()
        scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"q=kabel", "headers": [], "http_version": "1.1"}
        asked = asyncio.create_task(app(scope, receive, send))
        await asyncio.to_thread(reached.wait, 30)
        asked.cancel()
        await asked
        go.set()
        await served.stop()

    asyncio.run(stopped())
    assert sent[0]["status"] == 503
    assert json.loads(sent[1]["body"]) == {"error": "the server is being stopped"}


def test_mistakes_of_the_command(folder, tmp_path, capsys):
    for arguments, message in (
        ([str(tmp_path)], "no index there"),
        ([str(folder), "--host", "0.0.0.0"], "needs --token"),
        ([str(folder), "--host", "0.0.0.0", "--token", "short"], "at least 16"),
        ([str(folder), "--host", "no.such.name.invalid", "--token", TOKEN], "--host no.such.name.invalid"),
    ):
        assert main(["serve", *arguments]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert message in said[-1]


def test_no_pickle_anywhere():
    sources = "\n".join(path.read_text() for path in Path(serve.__file__).parent.rglob("*.py"))
    assert not re.search(r"import pickle|allow_pickle=True|pickle\.load", sources)
    assert "weights_only=False" not in sources
