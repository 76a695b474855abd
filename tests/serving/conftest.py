"""A served index with documents that hold markup and lone surrogates."""

import pytest
from starlette.testclient import TestClient

from anysplade import Document, Index
from anysplade.serving.app import create_app
from anysplade.serving.batching import Searcher
from tiny import make_backbone, make_collection

HOSTILE = '<script>alert("kabel")</script> kabel <img src=x onerror=alert(1)> kabel'


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
