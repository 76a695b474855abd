import concurrent.futures
import re
import shutil
import threading

import numpy as np
import pytest
from starlette.testclient import TestClient

from anysplade import Index
from anysplade.model.encoding import encode
from anysplade.model.probe import PROBE_QUERIES
from anysplade.search.store import Store
from anysplade.serving.app import create_app
from anysplade.serving.batching import Searcher
from servers import http_get, running
from tiny import make_backbone, make_collection, no_encoder


def test_a_head_that_is_wider_than_the_vocabulary(tmp_path):
    backbone = make_backbone("bert", tmp_path / "padded", vocab_size=160)
    with Index.build(backbone, make_collection(tmp_path / "collection"), tmp_path / "index") as index:
        expected = index.search("kabel locor", 1, explain=True)
        encoded = encode(index.encoder, ["kabel locor"], "query")
    with TestClient(create_app(Searcher(tmp_path / "index")), base_url="http://localhost") as client:
        hits = client.post("/search", json={"query": "kabel locor", "k": 1, "explain": True}).json()["hits"]
        (vector,) = client.post("/encode", json={"texts": ["kabel locor"]}).json()["vectors"]
        pages = [client.get(path) for path in ("/?q=kabel+locor", "/terms?text=kabel+locor", "/cost", "/head")]
    assert [term["term"] for term in hits[0]["terms"]] == [term.term for term in expected[0].terms]
    assert sorted(vector["values"]) == pytest.approx(sorted(encoded.data.tolist()), rel=1e-5)
    assert [page.status_code for page in pages] == [200] * 4
    assert "[term:15" in pages[1].text
    assert all(">None<" not in page.text for page in pages)


def test_markup_in_documents_is_escaped(client):
    for path in ("/?q=kabel&k=50", "/results?q=kabel&k=50", "/compare?q=kabel", "/terms?text=<script>x</script>"):
        page = client.get(path)
        assert page.status_code == 200
        assert len(re.findall(r"<script", page.text)) == ("results" not in path)  # our own, in the head
        assert "<i>title" not in page.text
        assert "<img src=x" not in page.text
    assert "&lt;i&gt;title" in client.get("/?q=kabel&k=50").text


def test_ids_with_lone_surrogates_are_shown(client):
    for path in ("/?q=kabel&k=50", "/results?q=kabel&k=50", "/compare?q=kabel"):
        page = client.get(path)
        assert page.status_code == 200
        assert "half ?" in page.text
    hits = client.post("/search", json={"query": "kabel", "k": 50}).json()["hits"]
    assert "half \ud800" in [hit["id"] for hit in hits]


def test_login_without_a_token_sets_no_cookie(client):
    for form in (b"token=\xff\xfe", b"token=%ff%0d%0aSet-Cookie:x", b"token=x", b""):
        response = client.post("/login", content=form, follow_redirects=False)
        assert response.status_code == 303
        assert "set-cookie" not in response.headers


def test_searches_are_answered_while_the_cost_is_counted(folder, monkeypatch):
    reached, go, items, passes = threading.Event(), threading.Event(), Store.__iter__, []

    def slow(self):
        passes.append(self)
        for item in items(self):
            reached.set()
            assert go.wait(60)
            yield item

    monkeypatch.setattr(Store, "__iter__", slow)
    with running(folder) as address, concurrent.futures.ThreadPoolExecutor(3) as pool:
        pending = [pool.submit(http_get, address, "/cost") for _ in range(3)]
        try:
            assert reached.wait(30)
            for path in ("/?q=kabel", "/results?q=kabel", "/terms?text=kabel", "/health", "/metrics", "/openapi.json"):
                assert http_get(address, path)[0] == 200
            assert not any(future.done() for future in pending)
        finally:
            go.set()
        pages = {future.result() for future in pending}
    assert len(passes) == 1
    assert len(pages) == 1
    ((status, page),) = pages
    with Index.load(folder) as index:
        documents = list(index.store)
        rows = encode(index.encoder, list(PROBE_QUERIES), "query")
    postings = sum(len(document.terms) for document in documents)
    frequency = np.bincount(np.concatenate([document.terms for document in documents]), minlength=rows.shape[1])
    query_postings = np.mean([frequency[row.indices].sum() for row in rows])
    assert status == 200
    for value in (f"{len(documents)}", f"{postings:,}", f"{query_postings:,.0f}", f"{postings / len(documents):.1f}"):
        assert f"<td>{value}</td>" in page.decode()


def test_queries_by_token_are_served_without_the_encoder(static_index, tmp_path):
    """Encoding documents and measuring the head load it, once."""
    shutil.copytree(static_index, tmp_path / "index")
    with no_encoder():
        app = create_app(Searcher(tmp_path / "index", "bm25"))
    queries = {
        "/search": {"query": "kabel", "explain": True},
        "/encode": {"texts": ["kabel"]},
        "/explain": {"query": "kabel", "id": "d0"},
    }
    pages = ("/?q=kabel", "/results?q=kabel", "/terms?text=kabel", "/compare?q=kabel", "/cost", "/health", "/metrics")
    with TestClient(app, base_url="http://localhost") as client:
        with no_encoder():
            assert [client.post(path, json=body).status_code for path, body in queries.items()] == [200] * 3
            found = {path: client.get(path) for path in pages}
            assert [page.status_code for page in found.values()] == [200] * len(pages)
            assert "kabel" in found["/terms?text=kabel"].text
        assert client.post("/encode", json={"texts": ["kabel"], "role": "document"}).json()["vectors"][0]
        with no_encoder():
            assert [client.get(path).status_code for path in ("/terms?text=kabel&role=document", "/head", "/head.svg")] == [200] * 3


def test_the_head_page_loads_the_encoder(static_index, tmp_path):
    shutil.copytree(static_index, tmp_path / "index")
    with TestClient(create_app(Searcher(tmp_path / "index")), base_url="http://localhost") as client:
        assert client.get("/head").status_code == 200
