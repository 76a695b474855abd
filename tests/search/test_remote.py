"""The same corpus and model on a server and in a folder give the same hits. The server is Qdrant's client in memory."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from anysplade import DataError, Index, ModelError, OptionError, OutputError, export_onnx, load_collection, load_encoder
from anysplade.cli import main
from anysplade.model.modules import term_names
from anysplade.model.runtimes import resolve_precision
from anysplade.search import open_index, remote
from anysplade.search.engines.qdrant import QdrantEngine
from anysplade.search.remote import RemoteIndex
from tiny import no_encoder

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


def test_queries_of_an_exported_model(server, model, collection_folder, tmp_path):
    pytest.importorskip("onnxscript")
    RemoteIndex.build(model, collection_folder, ADDRESS, tmp_path / "work")
    export_onnx(model, tmp_path / "onnx")
    query = next(iter(load_collection(collection_folder).queries.values()))
    expected = open_index(ADDRESS).search(query)
    with no_encoder():
        hits = open_index(ADDRESS, tmp_path / "onnx").search(query)
    assert [hit.id for hit in hits] == [hit.id for hit in expected]
    assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in expected], rel=1e-5)


def test_no_more_tokens_than_positions(server, model, collection_folder, tmp_path):
    with pytest.raises(OptionError, match="give at most 64"):
        RemoteIndex.build(model, collection_folder, ADDRESS, tmp_path / "work", max_length=65)
    assert not (tmp_path / "work").exists()


def test_a_second_build_sends_nothing(server, model, collection_folder, tmp_path, monkeypatch):
    first = RemoteIndex.build(model, collection_folder, ADDRESS, tmp_path / "work")
    sent = []
    upload = QdrantEngine.upload
    monkeypatch.setattr(QdrantEngine, "upload", lambda self, *a, **k: sent.append(upload(self, *a, **k)))
    RemoteIndex.build(model, collection_folder, ADDRESS, tmp_path / "work")
    assert sent == [0]
    assert len(first) == 40


def test_a_changed_corpus(server, model, collection_folder, tmp_path, caplog):
    corpus = tmp_path / "corpus.jsonl"
    lines = (collection_folder / "corpus.jsonl").read_text().splitlines()
    corpus.write_text("\n".join(lines))
    first = RemoteIndex.build(model, corpus, ADDRESS, tmp_path / "work")
    assert (first.sent, first.left_over, len(first)) == (40, 0, 40)
    changed = ['{"_id": "d0", "text": "kabel"}', '{"_id": "new", "text": "lodan"}', *lines[1:-2]]
    corpus.write_text("\n".join(changed))
    second = RemoteIndex.build(model, corpus, ADDRESS, tmp_path / "work")
    assert (second.sent, second.left_over, len(second)) == (2, 2, 41)
    assert "holds 2 documents that are not in" in caplog.text
    assert {hit.id: hit.text for hit in second.search("kabel", k=50)}["d0"] == "kabel"


@pytest.mark.parametrize("first, second", [(None, 8), (8, None), (8, 9)])
def test_made_with_another_length(first, second, server, model, collection_folder, tmp_path, monkeypatch):
    RemoteIndex.build(model, collection_folder, ADDRESS, tmp_path / "work", max_length=first)
    monkeypatch.setattr("anysplade.search.document_encoding.encode_documents", None)  # refused before anything is encoded
    with pytest.raises(OutputError, match=rf"was made with another max_length \({first}\); choose another name"):
        RemoteIndex.build(model, collection_folder, ADDRESS, tmp_path / "work", max_length=second)


def test_made_in_another_way(server, model, collection_folder, tmp_path, monkeypatch):
    first = RemoteIndex.build(model, collection_folder, ADDRESS, tmp_path / "work", precision="auto", top_k=5)
    assert first.about["precision"] == resolve_precision("auto")
    monkeypatch.setattr("anysplade.search.document_encoding.encode_documents", None)  # refused before anything is encoded
    for option in ({}, {"precision": "bfloat16", "top_k": 5} if first.about["precision"] == "float32" else {"top_k": 5}):
        with pytest.raises(OutputError, match="was made with another"):
            RemoteIndex.build(model, collection_folder, ADDRESS, tmp_path / "work", **option)


def test_auto_is_the_precision_that_is_there(server, model, collection_folder, tmp_path, monkeypatch):
    RemoteIndex.build(model, collection_folder, ADDRESS, tmp_path / "work", precision="bfloat16")
    monkeypatch.setattr("anysplade.model.runtimes.native_bfloat16", lambda device: False)
    again = RemoteIndex.build(model, collection_folder, ADDRESS, tmp_path / "work", precision="auto")
    assert (again.sent, again.about["precision"]) == (0, "bfloat16")


def test_a_model_that_was_moved(server, model, collection_folder, tmp_path):
    RemoteIndex.build(model, collection_folder, ADDRESS, tmp_path / "work")
    model.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="name it with `model`"):
        open_index(ADDRESS).search("kabel")
    assert open_index(ADDRESS, tmp_path / "elsewhere").search("kabel")


@pytest.mark.parametrize("engine", ["qdrant", "opensearch"])
def test_a_server_that_is_not_there(engine, model, collection_folder, capsys):
    """Said in one line, and before anything is encoded."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"{engine}://127.0.0.1:{taken.getsockname()[1]}/tiny"
        assert main(["index", str(model), str(collection_folder), "--to", address]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("anysplade: ")
    assert "refused" in errors
    assert errors.count("\n") == 1
    assert not (Path(os.environ["ANYSPLADE_CACHE"]) / "shards").exists()


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


def stored_weights(client):
    points, _ = client.scroll("tiny", limit=100, with_vectors=True, with_payload=["id"])
    vectors = {point.payload["id"]: point.vector["splade"] for point in points}
    return {id_: dict(zip(vector.indices, vector.values, strict=True)) for id_, vector in vectors.items()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_explanation_is_of_the_vectors_that_were_sent(precision, server, model, collection_folder, tmp_path):
    RemoteIndex.build(model, collection_folder, ADDRESS, tmp_path / "work", top_k=8, precision=precision)
    tolerance = 1e-5 if precision == "float32" else 1e-2
    sent = stored_weights(server)
    there = open_index(ADDRESS)
    ids = {name: term for term, name in enumerate(term_names(there.encoder))}
    hits = there.search("kabel lodan mifil", k=40, explain=True)
    assert len(hits) > 5
    for hit in hits:
        assert sum(term.product for term in hit.terms) == pytest.approx(hit.score, rel=tolerance)
        for term in hit.terms:
            assert term.document_weight == pytest.approx(sent[hit.id][ids[term.term]], rel=tolerance)
        if precision == "bfloat16":  # which has the upper 16 bits of a float32
            assert all(np.float32(term.document_weight).view(np.uint32) & 0xFFFF == 0 for term in hit.terms)


def test_what_auto_meant_is_recorded(server, model, collection_folder, tmp_path):
    index = RemoteIndex.build(model, collection_folder, ADDRESS, tmp_path / "work", precision="auto")
    assert index.about["precision"] in ("float32", "bfloat16")
    for other in ({"precision": "auto", "top_k": 5}, {"precision": "bfloat16", "top_k": 5}):
        with pytest.raises(OutputError, match=r"another .*top_k"):
            RemoteIndex.build(model, collection_folder, ADDRESS, tmp_path / "work", **other)
    assert max(map(len, stored_weights(server).values())) > 5


def test_a_collection_that_others_made(server):
    server.create_collection("tiny", vectors_config={}, sparse_vectors_config={"splade": models.SparseVectorParams()})
    with pytest.raises(DataError, match="does not say which model"):
        open_index(ADDRESS).search("kabel")


def test_queries_by_token_need_no_encoder(server, static_index, collection_folder, tmp_path):
    with Index.load(static_index) as here:
        RemoteIndex.build(here.about["model"], collection_folder, ADDRESS, tmp_path / "work")
        there = open_index(ADDRESS)
        with no_encoder():
            hits = there.search("kabel lodan", k=40)
            expected = here.search("kabel lodan", k=40, explain=True)
        assert {hit.id: pytest.approx(hit.score, rel=1e-5) for hit in hits} == {hit.id: hit.score for hit in expected}
        explained = {hit.id: hit.terms for hit in there.search("kabel lodan", k=40, explain=True)}
    for hit in expected:
        assert [term.term for term in explained[hit.id]] == [term.term for term in hit.terms]
