import json
import multiprocessing

import numpy as np
import pytest
import torch
from sentence_transformers import SparseEncoder

from anysplade import AnyspladeError, DataError, ModelError, OptionError, OutputError, load_collection
from anysplade.model.encoder import masked_lm, open_encoder
from anysplade.model.encoding import encode, prune
from anysplade.search import shards
from anysplade.search.shards import encode_corpus, read_shard
from tiny import counted_copy


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "_SIZE", 16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of several workers has
    yield
    torch.set_num_threads(threads)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.npz")}


def test_shards_hold_the_corpus(backbone, collection_folder, tmp_path):
    manifest = encode_corpus(backbone, collection_folder, tmp_path / "shards")
    assert [shard["documents"] for shard in manifest["shards"]] == [16, 16, 8]
    assert manifest == json.loads((tmp_path / "shards" / "manifest.json").read_text())
    corpus = load_collection(collection_folder).corpus
    expected = encode(open_encoder(backbone), [document.full_text for document in corpus.values()], "document")
    ids, start = [], 0
    for shard in manifest["shards"]:
        names, rows = read_shard(tmp_path / "shards" / shard["file"])
        ids += names
        np.testing.assert_allclose(rows.toarray(), expected[start : start + len(names)].toarray(), rtol=1e-4, atol=1e-4)
        assert rows.indices.dtype == np.int32
        start += len(names)
    assert ids == list(corpus)
    assert manifest["postings"] == pytest.approx(expected.nnz, rel=0.01)


def test_several_processes_write_the_same_bytes(backbone, collection_folder, tmp_path):
    encode_corpus(backbone, collection_folder, tmp_path / "one")
    encode_corpus(backbone, collection_folder, tmp_path / "two", workers=2)
    assert len(content(tmp_path / "one")) == 3
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_a_worker_that_dies_is_said(backbone, collection_folder, tmp_path, monkeypatch):
    kept = shards._kept

    def kill_them(part, folder):
        if part.number == 2:
            for worker in multiprocessing.active_children():
                worker.kill()
        return kept(part, folder)

    with monkeypatch.context() as patched:
        patched.setattr(shards, "_kept", kill_them)
        with pytest.raises(AnyspladeError, match="fewer --workers"):
            encode_corpus(backbone, collection_folder, tmp_path / "shards", workers=2)
    assert encode_corpus(backbone, collection_folder, tmp_path / "shards", workers=2)["documents"] == 40


@pytest.mark.parametrize("workers", [1, 2])
def test_a_model_that_cannot_be_opened_is_said_by_any_number_of_workers(workers, backbone, collection_folder, tmp_path):
    open_encoder(backbone).save_pretrained(str(tmp_path / "torn"))
    (weights,) = (tmp_path / "torn").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match="torn: cannot be loaded"):
        encode_corpus(tmp_path / "torn", collection_folder, tmp_path / "shards", workers=workers)


def test_a_document_that_the_model_cannot_take_is_named(backbone, collection_folder, tmp_path):
    encoder = open_encoder(backbone)
    word = load_collection(collection_folder).corpus["d37"].text.split()[0]  # of the third shard
    with torch.no_grad():
        masked_lm(encoder).get_input_embeddings().weight[encoder.tokenizer.convert_tokens_to_ids(word)] = torch.nan
    encoder.save_pretrained(str(tmp_path / "diverged"))
    with pytest.raises(ModelError, match=r"NaN or infinity for document 'd\d+'; its training diverged"):
        encode_corpus(tmp_path / "diverged", collection_folder, tmp_path / "shards")


def test_one_copy_in_bfloat16_a_process(backbone, collection_folder, tmp_path, monkeypatch):
    copies = []
    monkeypatch.setattr(SparseEncoder, "__deepcopy__", counted_copy(copies), raising=False)
    manifest = encode_corpus(backbone, collection_folder, tmp_path / "shards", precision="bfloat16")
    assert (len(manifest["shards"]), len(copies)) == (3, 1)
    assert manifest["precision"] == "bfloat16"


def test_a_call_that_makes_nothing_keeps_the_provenance(backbone, collection_folder, tmp_path, monkeypatch):
    first = encode_corpus(backbone, collection_folder, tmp_path / "shards")
    monkeypatch.setattr(shards, "provenance", lambda: "another call")
    assert encode_corpus(backbone, collection_folder, tmp_path / "shards") == first
    assert json.loads((tmp_path / "shards" / "manifest.json").read_text()) == first


def test_resumed(backbone, collection_folder, tmp_path, monkeypatch):
    encode_corpus(backbone, collection_folder, tmp_path / "shards")
    whole = content(tmp_path / "shards")
    for name in ("000001.npz", "000001.json", "manifest.json"):
        (tmp_path / "shards" / name).unlink()
    made = []
    make = shards._make
    monkeypatch.setattr(shards, "_make", lambda encoder, part, *rest: (made.append(part.number), make(encoder, part, *rest))[1])
    encode_corpus(backbone, collection_folder, tmp_path / "shards")
    assert made == [1]
    assert content(tmp_path / "shards") == whole


def test_a_shard_of_other_documents_is_made_again(backbone, collection_folder, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text((collection_folder / "corpus.jsonl").read_text())
    before = encode_corpus(backbone, corpus, tmp_path / "shards")["shards"]
    lines = corpus.read_text().splitlines()
    corpus.write_text("\n".join([*lines[:20], json.dumps({"_id": "d20", "text": "kabel"}), *lines[21:]]) + "\n")
    after = encode_corpus(backbone, corpus, tmp_path / "shards")["shards"]
    assert [a["sha256"] == b["sha256"] for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_pruned_and_rounded(backbone, collection_folder, tmp_path):
    whole = encode_corpus(backbone, collection_folder, tmp_path / "whole")
    small = encode_corpus(backbone, collection_folder, tmp_path / "small", top_k=5, weight_type="float16")
    assert (small["top_k"], small["weight_type"], small["postings"]) == (5, "float16", 200)
    rows = read_shard(tmp_path / "whole" / whole["shards"][0]["file"])[1]
    pruned = read_shard(tmp_path / "small" / small["shards"][0]["file"])[1]
    np.testing.assert_allclose(pruned.toarray(), prune(rows, 5).toarray(), rtol=1e-3)
    assert pruned.dtype == np.float32


def test_faults(backbone, collection_folder, tmp_path):
    encode_corpus(backbone, collection_folder, tmp_path / "shards")
    with pytest.raises(OutputError, match="made with another top_k"):
        encode_corpus(backbone, collection_folder, tmp_path / "shards", top_k=3)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="no encoded corpus"):
        encode_corpus(backbone, collection_folder, tmp_path / "full")
    with pytest.raises(OptionError, match="workers 0"):
        encode_corpus(backbone, collection_folder, tmp_path / "a", workers=0)
    with pytest.raises(ModelError):
        encode_corpus(tmp_path / "nowhere", collection_folder, tmp_path / "a")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="the corpus is empty"):
        encode_corpus(backbone, tmp_path / "empty.jsonl", tmp_path / "a")
    path = tmp_path / "shards" / "000000.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="the shard is damaged"):
        read_shard(path)


@pytest.mark.slow  # half a minute, and Ray is large: CI does without
def test_ray_writes_the_same_bytes(backbone, collection_folder, tmp_path):
    ray = pytest.importorskip("ray", reason='pip install "anysplade[ray]"')
    ray.init(num_cpus=2, include_dashboard=False, ignore_reinit_error=True)
    try:
        encode_corpus(backbone, collection_folder, tmp_path / "one")
        encode_corpus(backbone, collection_folder, tmp_path / "ray", workers=2, ray=True)
    finally:
        ray.shutdown()
    assert content(tmp_path / "ray") == content(tmp_path / "one")
