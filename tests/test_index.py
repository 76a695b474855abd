import json
import multiprocessing
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from anysplade import DataError, Document, Index, ModelError, OptionError, OutputError, load_collection, load_encoder
from anysplade.evaluation import evaluate
from anysplade.postings import Postings
from tiny import WORDS


@pytest.fixture
def built(backbone, collection_folder, tmp_path):
    load_encoder(backbone, k=1, shift=0).save_pretrained(str(tmp_path / "model"))
    return Index.build(tmp_path / "model", collection_folder, tmp_path / "index")


@settings(max_examples=60, deadline=None)
@given(
    documents=st.integers(1, 30),
    vocabulary=st.integers(1, 20),
    density=st.floats(0, 1),
    k=st.integers(1, 40),
    seed=st.integers(0, 2**16),
    levels=st.integers(1, 4),
)
def test_top_is_the_dense_product(documents, vocabulary, density, k, seed, levels):
    generator = np.random.default_rng(seed)
    matrix = generator.integers(0, levels + 1, (documents, vocabulary)) * (generator.random((documents, vocabulary)) < density)
    query = generator.integers(0, levels + 1, vocabulary) * 0.5
    terms = np.flatnonzero(query)
    postings = Postings.from_documents(sparse.csr_matrix(matrix.astype(np.float32)))
    found, scores = postings.top(terms, query[terms].astype(np.float32), k)
    expected = matrix @ query
    order = [d for d in np.argsort(-expected, kind="stable") if expected[d] > 0][:k]  # ties in corpus order
    assert found.tolist() == order
    assert np.array_equal(scores, expected[order])


def test_search_and_explain(built, tmp_path):
    index = Index.load(tmp_path / "index")
    assert len(index) == 40
    hits = index.search("kabel lodan mifil", k=5, explain=True)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert hits == built.search("kabel lodan mifil", k=5, explain=True)
    for hit in hits:
        assert sum(match.product for match in hit.terms) == pytest.approx(hit.score, rel=1e-9)
        assert [m.product for m in hit.terms] == sorted((m.product for m in hit.terms), reverse=True)
        for match in hit.terms:
            assert match.product == match.query_weight * match.document_weight
    vectors = index.encoder.encode(["kabel lodan mifil", hits[0].text], convert_to_sparse_tensor=False)
    assert hits[0].score == pytest.approx(float(vectors[0] @ vectors[1]), rel=1e-4)
    assert built.search("kabel", k=3)[0].terms is None


def test_index_and_evaluation_agree(built, collection_folder, tmp_path):
    run = evaluate(tmp_path / "model", collection_folder).run
    for query_id, text in load_collection(collection_folder).queries.items():
        assert {hit.id: pytest.approx(hit.score, rel=1e-5) for hit in built.search(text, k=1000)} == run[query_id]


def test_more_hits_than_documents(built):
    assert len(built.search("kabel", k=1000)) <= 40
    with pytest.raises(OptionError, match="at least 1"):
        built.search("kabel", k=0)


def test_mistakes(built, backbone, collection_folder, tmp_path):
    with pytest.raises(OutputError, match="not empty: it holds an index with another model"):
        Index.build(backbone, collection_folder, tmp_path / "index")
    with pytest.raises(DataError, match="no index there"):
        Index.load(tmp_path)
    about = tmp_path / "index" / "index.json"
    said = json.loads(about.read_text())
    for changed, message in (
        ({"format": 1}, "format 1, this version reads 3"),
        ({"complete": False}, "was interrupted; run the same"),
    ):
        about.write_text(json.dumps(said | changed))
        with pytest.raises(DataError, match=message):
            Index.load(tmp_path / "index")
    about.write_text("torn")
    with pytest.raises(DataError, match="damaged"):
        Index.load(tmp_path / "index")


def test_a_second_call_does_nothing_twice(built, collection_folder, tmp_path, monkeypatch):
    built.close()
    monkeypatch.setattr("anysplade.index.encode_corpus", None)
    assert len(Index.build(tmp_path / "model", collection_folder, tmp_path / "index")) == 40


def test_added_changed_and_deleted(built):
    built.add({"new": Document("T", "kabel kabel", {"lang": "en"}), "d0": Document("", "lodan", {"lang": "de"})})
    assert len(built) == 41
    assert {hit.id for hit in built.search("kabel", k=100, filter={"lang": ["en", "de"]})} <= {"new", "d0"}
    (hit,) = built.search("kabel", k=100, filter={"lang": "en"})
    assert (hit.id, hit.title, hit.text, hit.metadata) == ("new", "T", "kabel kabel", {"lang": "en"})
    assert built.delete(["new", "nobody"]) == 1
    assert built.search("kabel", k=100, filter={"lang": "en"}) == []
    assert built.delete(["new"]) == 0


def test_exact_search_agrees(built):
    exact = built.search("kabel lodan", k=10, exact=True)
    assert [hit.id for hit in built.search("kabel lodan", k=10)] == [hit.id for hit in exact]
    assert [hit.score for hit in built.search("kabel lodan", k=10)] == pytest.approx([hit.score for hit in exact], rel=1e-5)


def test_a_snapshot_is_an_index(built, tmp_path):
    built.snapshot(tmp_path / "copy")
    built.delete(["d0", "d1"])
    copy = Index.load(tmp_path / "copy")
    assert (len(copy), len(built)) == (40, 38)
    assert len(copy.search("kabel", k=100)) <= 40
    with pytest.raises(OutputError, match="not empty"):
        built.snapshot(tmp_path / "copy")


def test_top_k_is_kept_and_said(backbone, collection_folder, tmp_path):
    index = Index.build(backbone, collection_folder, tmp_path / "index", top_k=5)
    assert index.about["document_active_dims"] == 5
    assert index.about["top_k"] == 5
    index.add({"new": Document("", "kabel lodan")})
    assert all(len(document.terms) == 5 for document in index.store)


def _build(model, corpus, output):
    import anysplade.shards

    anysplade.shards._SIZE = 500
    # Vectors of the words themselves: what is tested is the indexing, not the model.
    anysplade.shards.encode = _words
    Index.build(model, corpus, output)


def _words(encoder, texts, role, **options):
    tokens = [sorted(set(encoder.tokenizer(text)["input_ids"])) for text in texts]
    indptr = np.cumsum([0, *map(len, tokens)])
    return sparse.csr_matrix((np.ones(indptr[-1], np.float32), np.concatenate(tokens), indptr), shape=(len(texts), 149))


@pytest.mark.parametrize("count, wanted", [(10_000, 5), pytest.param(50_000, 20, marks=pytest.mark.slow)])  # a minute
def test_killed_at_random_moments(backbone, tmp_path, count, wanted):
    """Each time the same call goes on; in the end nothing is lost, nothing is there twice, and searching is the same."""
    generator = random.Random(int(time.time()))
    with open(tmp_path / "corpus.jsonl", "w") as file:
        for i in range(count):
            file.write(json.dumps({"_id": f"d{i}", "text": " ".join(generator.sample(WORDS, 3))}) + "\n")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["anysplade.index"])
    kills = 0
    while kills < wanted:
        process = context.Process(target=_build, args=(backbone, tmp_path / "corpus.jsonl", tmp_path / "killed"))
        process.start()
        process.join(generator.uniform(0.3, 1.5))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        elif kills < wanted:  # done before all kills: once more from the beginning
            shutil.rmtree(tmp_path / "killed")
        process.join()
    for name in ("killed", "clean"):
        process = context.Process(target=_build, args=(backbone, tmp_path / "corpus.jsonl", tmp_path / name))
        process.start()
        process.join(120)
        assert process.exitcode == 0
    killed, clean = Index.load(tmp_path / "killed"), Index.load(tmp_path / "clean")
    assert (
        [document.id for document in killed.store] == [document.id for document in clean.store] == [f"d{i}" for i in range(count)]
    )
    for _ in range(50):
        terms = np.array(sorted(generator.sample(range(5, 149), 3)))
        weights = np.array([generator.random() + 0.1 for _ in terms], np.float32)
        a, b, c = (
            store.search(terms, weights, 20, exact=exact)
            for store, exact in ((killed.store, False), (clean.store, False), (clean.store, True))
        )
        assert [score for _, score in a] == pytest.approx([score for _, score in b])
        assert [score for _, score in a] == pytest.approx([score for _, score in c])
    for index in (killed, clean):
        assert len(index.store.search(np.arange(149), np.ones(149, np.float32), 2 * count)) == count  # each in the engine, once


def test_another_model_in_the_place_of_the_old_is_noticed(built, backbone, tmp_path):
    load_encoder(backbone, k=3, shift=0).save_pretrained(str(tmp_path / "model"))
    with pytest.raises(ModelError, match="changed since"):
        Index.load(tmp_path / "index").search("kabel")


def test_a_failed_build_leaves_nothing(backbone, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"_id": "a", "text": "kabel"}\n{"_id": "b"}\n')
    with pytest.raises(DataError):
        Index.build(backbone, tmp_path / "bad.jsonl", tmp_path / "index")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_a_failed_build_keeps_what_was_encoded(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr("anysplade.shards._SIZE", 2)
    good = [json.dumps({"_id": f"d{i}", "text": "kabel"}) for i in range(5)]
    (tmp_path / "corpus.jsonl").write_text("\n".join([*good, "{"]))
    with pytest.raises(DataError, match=r"corpus\.jsonl:6"):
        Index.build(backbone, tmp_path / "corpus.jsonl", tmp_path / "index")
    first = tmp_path / "index" / "shards" / "000000.npz"
    made = first.stat().st_mtime_ns
    (tmp_path / "corpus.jsonl").write_text("\n".join(good))
    monkeypatch.setattr("anysplade.index.shutil.rmtree", lambda *_, **__: None)  # to look at the shards afterwards
    with Index.build(backbone, tmp_path / "corpus.jsonl", tmp_path / "index") as index:
        assert len(index) == 5
    assert first.stat().st_mtime_ns == made


def test_what_is_added_has_the_precision_of_the_index(backbone, tmp_path):
    with Index.build(backbone, {"a": Document("", "kabel lodan")}, tmp_path / "index", precision="bfloat16") as index:
        index.add({"b": Document("", "kabel lodan")})
        first, second = index.store
        np.testing.assert_array_equal(first.weights, second.weights)
        assert not (first.weights.view(np.uint32) & 0xFFFF).any()  # bfloat16 has the upper 16 bits of a float32
