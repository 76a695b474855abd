"""The same corpus and model on a server and in a folder give the same hits. The server is Qdrant's client in memory."""

import pytest
from qdrant_client import QdrantClient

from anysplade import Index, ModelError, OptionError, OutputError, load_collection, load_encoder, remote
from anysplade.engines.qdrant import QdrantEngine
from anysplade.remote import RemoteIndex, open_index

ADDRESS = "qdrant://localhost:6333/tiny"


@pytest.fixture
def server(monkeypatch):
    client = QdrantClient(":memory:")
    monkeypatch.setattr(remote, "open_engine", lambda address: QdrantEngine(client, address.rpartition("/")[2]))
    return client


@pytest.fixture
def model(backbone, tmp_path):
    load_encoder(backbone, k=1, shift=0).save_pretrained(str(tmp_path / "model"))
    return tmp_path / "model"


def test_the_same_hits(server, model, collection_folder, tmp_path):
    RemoteIndex.build(model, collection_folder, ADDRESS, tmp_path / "work")
    there, here = open_index(ADDRESS), Index.build(model, collection_folder, tmp_path / "index")
    assert len(there) == len(here) == 40
    for query in list(load_collection(collection_folder).queries.values())[:5]:
        a, b = there.search(query, k=40, explain=True), here.search(query, k=40, explain=True)
        assert [hit.score for hit in a] == pytest.approx([hit.score for hit in b], rel=1e-5)
        assert {hit.id for hit in a} == {hit.id for hit in b}
        mine, theirs = a[0], next(hit for hit in b if hit.id == a[0].id)
        assert [term.term for term in mine.terms[:3]] == [term.term for term in theirs.terms[:3]]
        assert sum(term.product for term in mine.terms) == pytest.approx(mine.score, rel=1e-4)


def test_a_second_build_sends_nothing(server, model, collection_folder, tmp_path, monkeypatch):
    first = RemoteIndex.build(model, collection_folder, ADDRESS, tmp_path / "work")
    sent = []
    upload = QdrantEngine.upload
    monkeypatch.setattr(QdrantEngine, "upload", lambda self, *a, **k: sent.append(upload(self, *a, **k)))
    RemoteIndex.build(model, collection_folder, ADDRESS, tmp_path / "work")
    assert sent == [0]
    assert len(first) == 40


def test_faults(server, model, backbone, collection_folder, tmp_path):
    index = RemoteIndex.build(model, collection_folder, ADDRESS, tmp_path / "work")
    with pytest.raises(OutputError):
        RemoteIndex.build(backbone, collection_folder, ADDRESS, tmp_path / "work")
    with pytest.raises(OptionError, match="at least 1"):
        index.search("kabel", k=0)
    with pytest.raises(OptionError, match="exact search needs the vectors"):
        index.search("kabel", exact=True)
    load_encoder(backbone, k=3, shift=0).save_pretrained(str(model))
    with pytest.raises(ModelError, match="changed since"):
        RemoteIndex(ADDRESS).search("kabel")
