import contextlib
import datetime
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sentence_transformers import SparseEncoder

import anysplade.model.encoder
import anysplade.search.database
import anysplade.search.index_model
import anysplade.search.store
from anysplade import DataError, Document, Index, ModelError, OptionError, OutputError, UsageError, load_collection, load_encoder
from anysplade.evaluation.evaluations import evaluate
from anysplade.model.encoding import encode, encode_parts
from anysplade.model.runtimes import resolve_precision
from anysplade.search.exact import Postings
from anysplade.search.index import Changes
from processes import drop_privileges, preloaded_context, run_command, run_python
from tiny import WORDS, counted_copy, make_static, no_encoder


@pytest.fixture
def built(backbone, collection_folder, tmp_path):
    load_encoder(backbone, k=1, shift=0).save_pretrained(str(tmp_path / "model"))
    return Index.build(tmp_path / "model", collection_folder, tmp_path / "index")


@pytest.fixture
def corpus(tmp_path):
    return Corpus(tmp_path / "corpus.jsonl")


class Corpus:
    """A corpus file, written from texts by id."""

    def __init__(self, path):
        self.path = path

    def write(self, texts):
        rows = [{"_id": id_, "text": text, "metadata": {"odd": 0.1}} for id_, text in texts.items()]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def contents(index):
    return {document.id: document.content.text for document in index.store}


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
        ({"complete": False}, "an unfinished index; build it again"),
    ):
        about.write_text(json.dumps(said | changed))
        with pytest.raises(DataError, match=message):
            Index.load(tmp_path / "index")
    about.write_text("torn")
    with pytest.raises(DataError, match="damaged"):
        Index.load(tmp_path / "index")


def test_a_second_call_does_nothing_twice(built, collection_folder, tmp_path, monkeypatch):
    built.close()
    monkeypatch.setattr("anysplade.search.document_encoding.encode_documents", None)
    assert len(Index.build(tmp_path / "model", collection_folder, tmp_path / "index")) == 40


def seen(encoded):
    """``encode_parts`` that lists the ids of the documents that it encodes."""

    def encode_seen(encoder, parts, role, **options):
        for part, matrix, longer in encode_parts(encoder, parts, role, **options):
            if part.known is None:
                encoded.extend(part.tag[0].ids)
            yield part, matrix, longer

    return encode_seen


def test_a_changed_corpus_is_taken_over(backbone, corpus, tmp_path, monkeypatch):
    texts = {f"d{i}": f"{WORDS[i]} {WORDS[i + 1]}" for i in range(8)}
    corpus.write(texts)
    with Index.build(backbone, corpus.path, tmp_path / "index") as first:
        assert first.changes == Changes(8, 0, 0)
        vectors = {document.id: document.terms.tolist() for document in first.store}
    encoded = []
    monkeypatch.setattr("anysplade.search.document_encoding.encode_parts", seen(encoded))
    texts = {"new": "kabel"} | texts | {"d3": "lodan mifil", "newer": "kabel"}
    del texts["d5"], texts["d6"]
    corpus.write(texts)
    with Index.build(backbone, corpus.path, tmp_path / "index") as second:
        assert second.changes == Changes(2, 1, 2)
        assert encoded == ["new", "d3", "newer"]
        assert contents(second) == texts
        assert [document.id for document in second.store] == ["d0", "d1", "d2", "d3", "d4", "d7", "new", "newer"]
        assert {d.id: d.terms.tolist() for d in second.store}["d7"] == vectors["d7"]
        # Of equal scores the first added comes first: a new document after those that were there, a replaced one in its place.
        hits = [hit.id for hit in second.search("kabel", k=10)]
        assert hits.index("new") < hits.index("newer")
        assert second.about["updated"] | {"provenance": None} == second.changes._asdict() | {"provenance": None}
        assert not (tmp_path / "index" / "update").exists()
    corpus.write(dict(list(texts.items())[1:]))  # something is deleted only: the model is not needed
    monkeypatch.setattr("anysplade.search.document_encoding.open_encoder", None)
    assert Index.build(backbone, corpus.path, tmp_path / "index").changes == Changes(0, 0, 1)


def test_an_unchanged_corpus_changes_nothing(backbone, corpus, tmp_path, monkeypatch):
    corpus.write({f"d{i}": WORDS[i] for i in range(5)})
    Index.build(backbone, corpus.path, tmp_path / "index").close()
    before = {path: path.read_bytes() for path in (tmp_path / "index").rglob("*") if path.is_file() and path.parts[-2] != "engine"}
    made = (tmp_path / "index" / "index.json").stat().st_mtime_ns
    monkeypatch.setattr("anysplade.search.document_encoding.open_encoder", None)
    monkeypatch.chdir(tmp_path)
    with Index.build(backbone, "corpus.jsonl", "index", precision="auto") as again:  # the same places, in other words
        assert again.changes == Changes(0, 0, 0)
    assert (tmp_path / "index" / "index.json").stat().st_mtime_ns == made
    stays = {path: content for path, content in before.items() if path.suffix in (".json", ".sqlite")}
    assert {path: path.read_bytes() for path in stays} == stays


def test_a_corpus_that_cannot_be_read_changes_nothing(backbone, corpus, tmp_path):
    texts = {f"d{i}": WORDS[i] for i in range(5)}
    corpus.write(texts)
    Index.build(backbone, corpus.path, tmp_path / "index").close()
    for lines, message in ((['{"_id": "new", "text": "kabel"}', "{"], r"corpus\.jsonl:2"), ([], "the corpus is empty")):
        corpus.path.write_text("\n".join(lines))
        with pytest.raises(DataError, match=message):
            Index.build(backbone, corpus.path, tmp_path / "index")
        with Index.load(tmp_path / "index") as index:
            assert contents(index) == texts


@pytest.mark.parametrize("change", [lambda i: i.add({"mine": Document("", "kabel")}), lambda i: i.delete(["d0"])])
def test_what_was_changed_by_hand_is_not_undone(change, backbone, corpus, tmp_path):
    corpus.write({f"d{i}": WORDS[i] for i in range(3)})
    with Index.build(backbone, corpus.path, tmp_path / "index") as index:
        change(index)
        index.snapshot(tmp_path / "copy")
        held = contents(index)
    for folder in ("index", "copy"):
        with pytest.raises(OutputError, match="add or delete changed this index since it was built"):
            Index.build(backbone, corpus.path, tmp_path / folder)
        with Index.load(tmp_path / folder) as index:
            assert contents(index) == held


def test_an_interrupted_build_of_a_corpus_that_changed(backbone, corpus, tmp_path, monkeypatch):
    """What was taken in before the interruption is not what the corpus says now."""
    monkeypatch.setattr("anysplade.search.document_encoding.PART", 2)
    put = anysplade.search.index.Store.put
    corpus.write({"a": "kabel", "b": "lodan", "c": "mifil", "d": "nugor"})

    def stop_at_the_second(store, documents, **options):
        if len(store):
            raise KeyboardInterrupt
        put(store, documents, **options)

    monkeypatch.setattr("anysplade.search.index.Store.put", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        Index.build(backbone, corpus.path, tmp_path / "index")
    monkeypatch.setattr("anysplade.search.index.Store.put", put)
    texts = {"a": "perop", "new": "kabel", "c": "mifil", "d": "nugor"}
    corpus.write(texts)
    with Index.build(backbone, corpus.path, tmp_path / "index") as index:
        assert contents(index) == texts
        assert index.changes == Changes(4, 0, 0)


def test_an_interrupted_build_of_documents_that_changed(backbone, tmp_path, monkeypatch):
    optimize = anysplade.search.index.Store.optimize
    monkeypatch.setattr("anysplade.search.index.Store.optimize", lambda store: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Index.build(backbone, {"a": Document("", "kabel"), "b": Document("", "lodan")}, tmp_path / "index")
    monkeypatch.setattr("anysplade.search.index.Store.optimize", optimize)
    with Index.build(backbone, {"b": Document("", "mifil"), "c": Document("", "lodan")}, tmp_path / "index") as index:
        assert contents(index) == {"b": "mifil", "c": "lodan"}


def test_counts_are_those_of_now(built):
    before = built.describe()
    built.delete([f"d{i}" for i in range(1, 40)])
    (left,) = built.store
    assert built.describe() == before | {"documents": 1, "document_active_dims": len(left.terms)}


def test_precision_is_what_was_done(backbone, corpus, tmp_path, monkeypatch):
    texts = {"a": " ".join(WORDS[:40]), "b": " ".join(WORDS[30:60])}
    corpus.write(texts)
    copies = []
    monkeypatch.setattr(SparseEncoder, "__deepcopy__", counted_copy(copies), raising=False)
    documents = {id_: Document("", text) for id_, text in texts.items()}
    for source, folder in ((documents, "memory"), (corpus.path, "path")):
        copies.clear()
        with Index.build(backbone, source, tmp_path / folder, precision="bfloat16") as index:
            assert index.about["precision"] == "bfloat16"
            for word in WORDS[:3]:
                index.add({word: Document("", word)})
            assert len(copies) == 1
            weights = torch.tensor(np.concatenate([document.weights for document in index.store]))
            assert torch.equal(weights, weights.bfloat16().float())


def test_auto_is_said_as_what_it_meant(backbone, corpus, tmp_path, monkeypatch):
    corpus.write({"a": "kabel"})
    for native, meant in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr("anysplade.model.runtimes.native_bfloat16", lambda device, native=native: native)
        assert resolve_precision("auto") == meant
        for source, folder in ((corpus.path, f"path-{meant}"), ({"a": Document("", "kabel")}, f"memory-{meant}")):
            with Index.build(backbone, source, tmp_path / folder, precision="auto") as index:
                assert index.about["precision"] == meant
        assert json.loads((tmp_path / f"path-{meant}" / "index.json").read_text())["precision"] == meant
    corpus.write(
        {"a": "kabel", "b": "lodan"}
    )  # on a machine without bfloat16 products: the index's precision, which runs there too
    with Index.build(backbone, corpus.path, tmp_path / "path-bfloat16", precision="auto") as index:
        assert (index.about["precision"], index.changes) == ("bfloat16", Changes(1, 0, 0))


def test_index_and_model_that_were_moved(built, backbone, collection_folder, tmp_path):
    built.close()
    (tmp_path / "elsewhere").mkdir()
    for name in ("model", "index"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    with Index.load(tmp_path / "elsewhere" / "index") as index:  # together
        assert index.search("kabel")
        index.snapshot(tmp_path / "deeper" / "down" / "copy")
    with Index.load(tmp_path / "deeper" / "down" / "copy") as copy:
        assert copy.search("kabel")
    (tmp_path / "elsewhere" / "model").rename(tmp_path / "mine")
    with Index.load(tmp_path / "elsewhere" / "index") as index, pytest.raises(ModelError) as said:
        index.search("kabel")
    assert f"{tmp_path / 'model'}: no such model folder" in str(said.value)
    assert f"{tmp_path / 'elsewhere' / 'model'}: no such model folder" in str(said.value)
    assert "name it with `model`" in str(said.value)
    with Index.load(tmp_path / "elsewhere" / "index", tmp_path / "mine") as index:
        assert index.search("kabel")
    with Index.load(tmp_path / "elsewhere" / "index", backbone) as index, pytest.raises(ModelError, match="not the model of"):
        index.search("kabel")
    with Index.build(tmp_path / "mine", collection_folder, tmp_path / "elsewhere" / "index") as again:  # from where it is now
        assert again.changes == Changes(0, 0, 0)
    with Index.load(tmp_path / "elsewhere" / "index") as index:
        assert index.search("kabel")


def test_the_old_place_holds_another_model_by_now(built, backbone, tmp_path):
    built.close()
    shutil.copytree(tmp_path / "model", tmp_path / "elsewhere" / "model")
    shutil.copytree(tmp_path / "index", tmp_path / "elsewhere" / "index")
    load_encoder(backbone, k=3, shift=0).save_pretrained(str(tmp_path / "model"))
    with Index.load(tmp_path / "elsewhere" / "index") as index:
        assert index.search("kabel")


@pytest.fixture
def read_only(built, tmp_path):
    """The index's folder, which nobody may write; root may, so the tests give up that right."""
    folder = tmp_path / "index"
    built.close()
    subprocess.run(["chmod", "-R", "a-w", folder], check=True)
    yield folder
    subprocess.run(["chmod", "-R", "u+w", folder], check=True)


def test_a_read_only_index(read_only, tmp_path):
    said = run_command("search", read_only, "kabel lodan", "--json", preexec_fn=drop_privileges)
    assert said.returncode == 0, said.stderr
    assert said.stderr == f"{read_only}: read-only here; searched exactly, which is slower\n"
    with Index.load(read_only) as index:
        assert [hit["id"] for hit in json.loads(said.stdout)["hits"]] == [hit.id for hit in index.search("kabel lodan", exact=True)]
    code = f"""
from anysplade import Index, Document, OutputError
index = Index.load({str(read_only)!r})
for change in (lambda: index.delete(["d0"]), lambda: index.add({{"new": Document("", "kabel")}}), index.store.rebuild):
    try:
        change()
    except OutputError as error:
        print(error)
index.snapshot({str(tmp_path / "copy")!r})
"""
    said = run_python("-c", code, preexec_fn=drop_privileges)
    assert said.returncode == 0, said.stderr
    assert (
        said.stdout.splitlines()
        == [f"{read_only}: the index is read-only here; allow writing to its folder, or change a copy of it"] * 3
    )
    with Index.load(tmp_path / "copy") as copy:
        assert len(copy) == 40


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
    assert index.describe()["document_active_dims"] == 5
    assert index.about["top_k"] == 5
    index.add({"new": Document("", "kabel lodan")})
    assert all(len(document.terms) == 5 for document in index.store)


def _build(model, corpus, output):
    import anysplade.search.document_encoding

    anysplade.search.document_encoding.PART = 500
    # Vectors of the words themselves: what is tested is the indexing, not the model.
    anysplade.search.document_encoding.encode_parts = _words
    Index.build(model, corpus, output)


def _words(encoder, parts, role, **options):
    for part in parts:
        tokens = [sorted(set(encoder.tokenizer(text)["input_ids"])) for text in part.texts]
        indptr = np.cumsum([0, *map(len, tokens)])
        rows = (np.ones(indptr[-1], np.float32), np.concatenate(tokens), indptr)
        yield part, sparse.csr_matrix(rows, shape=(len(tokens), 149)) if part.known is None else part.known, 0


@pytest.mark.parametrize("count, wanted", [(10_000, 5), (50_000, 20)])  # a third of a minute, and a minute
@pytest.mark.slow
def test_killed_at_random_moments(backbone, tmp_path, count, wanted):
    """Each time the same call goes on; in the end nothing is lost, nothing is there twice, and searching is the same."""
    generator = random.Random(int(time.time()))
    with open(tmp_path / "corpus.jsonl", "w") as file:
        for i in range(count):
            file.write(json.dumps({"_id": f"d{i}", "text": " ".join(generator.sample(WORDS, 3))}) + "\n")
    context = preloaded_context()
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


def _update(model, corpus, output):
    import anysplade.search.build
    import anysplade.search.document_encoding

    anysplade.search.document_encoding.PART = 50
    anysplade.search.build.BATCH = anysplade.search.database.BATCH = anysplade.search.store.BATCH = 50
    anysplade.search.document_encoding.encode_parts = _words
    Index.build(model, corpus, output)


def test_an_update_killed_at_random_moments(backbone, corpus, tmp_path):
    """The index can be opened in between; in the end it is that of the corpus."""
    generator = random.Random(int(time.time()))

    def texts(ids):
        return {f"d{i}": " ".join(generator.sample(WORDS, 3)) for i in ids}

    corpus.write(texts(range(1500)))
    context = preloaded_context()

    def run(seconds):
        process = context.Process(target=_update, args=(backbone, corpus.path, tmp_path / "index"))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        return process.exitcode

    assert run(120) == 0
    after = texts(range(500, 2500))
    corpus.write(after)
    for _ in range(4):
        run(generator.uniform(0.3, 1.5))
        Index.load(tmp_path / "index").close()
    assert run(120) == 0
    with Index.load(tmp_path / "index") as index:
        assert contents(index) == after
        assert not (tmp_path / "index" / "update").exists()
        assert len(index.store.search(np.arange(149), np.ones(149, np.float32), 9000)) == len(after)


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
    monkeypatch.setattr("anysplade.search.document_encoding.PART", 2)
    monkeypatch.setattr("anysplade.search.document_encoding._COUNTED", 1)
    monkeypatch.setattr("anysplade.search.database.BATCH", 2)
    good = [json.dumps({"_id": f"d{i}", "text": "kabel"}) for i in range(5)]
    (tmp_path / "corpus.jsonl").write_text("\n".join([*good, "{"]))
    with pytest.raises(DataError, match=r"corpus\.jsonl:6"):
        Index.build(backbone, tmp_path / "corpus.jsonl", tmp_path / "index")
    (tmp_path / "corpus.jsonl").write_text("\n".join(good))
    encoded = []
    monkeypatch.setattr("anysplade.search.document_encoding.encode_parts", seen(encoded))
    with Index.build(backbone, tmp_path / "corpus.jsonl", tmp_path / "index") as index:
        assert [document.id for document in index.store] == [f"d{i}" for i in range(5)]
    assert encoded == ["d2", "d3", "d4"]  # d2 and d3 were being encoded while the part with the error was read


def test_what_is_added_has_the_precision_of_the_index(backbone, tmp_path):
    with Index.build(backbone, {"a": Document("", "kabel lodan")}, tmp_path / "index", precision="bfloat16") as index:
        index.add({"b": Document("", "kabel lodan")})
        first, second = index.store
        np.testing.assert_array_equal(first.weights, second.weights)
        assert not (first.weights.view(np.uint32) & 0xFFFF).any()  # bfloat16 has the upper 16 bits of a float32


def test_queries_by_token_need_no_encoder(static_index, tmp_path):
    shutil.copytree(static_index, tmp_path / "index")
    with Index.load(tmp_path / "index") as index:
        with no_encoder():
            hits = index.search("kabel lodan", k=40, explain=True)
            exact = index.search("kabel lodan", k=40, exact=True)
            with pytest.raises(AssertionError, match="loaded"):
                index.add({"new": Document("", "kabel")})
        assert len(hits) > 5
        assert {hit.id for hit in exact} == {hit.id for hit in hits}
        index.add({"new": Document("", "kabel")})
        assert "new" in {hit.id for hit in index.search("kabel", k=41)}
        index.delete(["new"])
        assert index.search_vector(encode(index.encoder, ["kabel lodan"], "query"), k=40, explain=True) == hits


def test_an_index_that_was_just_built_looks_its_queries_up(collection_folder, tmp_path, monkeypatch):
    with Index.build(make_static(tmp_path), collection_folder, tmp_path / "index") as index:
        encoder = index.encoder
        monkeypatch.setattr("anysplade.model.encoding._vectors", None)
        assert index.search("kabel")
        assert index.encoder is encoder


def test_an_encoder_is_loaded_once(built, tmp_path, monkeypatch):
    """And its files are compared once."""
    built.close()
    calls = []
    for module, name in ((anysplade.search.index_model, "fingerprint"), (anysplade.model.encoder, "open_encoder")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=function, **k: calls.append(f.__name__) or f(*a, **k))
    with Index.load(tmp_path / "index") as index:
        assert index.search("kabel", explain=True)
        index.add({"new": Document("", "kabel")})
        assert index.search("kabel", explain=True)
    assert calls == ["fingerprint", "open_encoder"]


def test_a_changed_table_of_weights_is_noticed(collection_folder, tmp_path):
    model = make_static(tmp_path)
    Index.build(model, collection_folder, tmp_path / "index").close()
    file = next((tmp_path / "model").glob("query_*/model.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with Index.load(tmp_path / "index") as index, pytest.raises(ModelError, match="changed since"):
        index.search("kabel")


@pytest.fixture
def own_index(static_index, tmp_path):
    return Path(shutil.copytree(static_index, tmp_path / "index"))


@pytest.mark.parametrize(
    "id_, document, message",
    [
        ("a2", Document("t", "x", "lang=en"), "document 'a2': \"metadata\" is not an object"),
        ("a2", Document("t", "x", [1]), "document 'a2': \"metadata\" is not an object"),
        ("a2", Document("t", "x", {"day": datetime.date(2020, 1, 1)}), "'a2': .*JSON cannot hold .*date"),
        ("a2", Document("t", "x", {"tags": {1}}), "'a2': .*JSON cannot hold .*set"),
        ("a2", Document("t", "x", {"n": np.int64(1)}), "'a2': .*JSON cannot hold .*int64"),
        ("a2", Document("t", "x", {"n": float("nan")}), "'a2': .*JSON cannot hold"),
        ("a2", Document("t", None, {}), "document 'a2': \"text\" is null, not a string"),
        ("a2", Document("t", 5, {}), "document 'a2': \"text\" is 5, not a string"),
        ("a2", Document(b"t", "x"), "document 'a2': \"title\" is .*, not a string"),
        ("", Document("t", "x"), "its id is empty"),
    ],
)
def test_a_malformed_document_changes_nothing(id_, document, message, own_index, tmp_path):
    with Index.load(own_index) as index:
        count = len(index)
        with pytest.raises(UsageError, match=message):
            index.add({"a1": Document("", "kabel"), id_: document})
        with pytest.raises(UsageError, match=message):
            Index.build(index.about["model"], {id_: document}, tmp_path / "new")
        assert len(index) == count
    assert not (tmp_path / "new").exists()


def test_no_title_is_an_empty_title(own_index):
    with Index.load(own_index) as index:
        index.add({"untitled": Document(None, "kabel")})
        assert index.store.find("untitled").content == Document("", "kabel")


def test_metadata_of_an_earlier_version(own_index, caplog):
    """It stored anything as metadata, and committed it before the engine refused it."""
    with Index.load(own_index) as index:
        index.add({"a": Document("", "kabel", {"lang": "en"}), "b": Document("", "kabel", {"x": 1})})
    with contextlib.closing(sqlite3.connect(own_index / "documents.sqlite")) as database, database:
        for id_, stored in (("a", '"lang=en"'), ("b", '{"x": NaN, "lang": "de"}')):
            (position,) = database.execute("SELECT position FROM ids WHERE id = ?", (id_,)).fetchone()
            database.execute("UPDATE contents SET metadata = ? WHERE position = ?", (stored, position))
            database.execute("INSERT INTO changed VALUES (?)", (position,))
        database.execute("UPDATE writes SET count = count + 1")
    with Index.load(own_index) as index:
        for exact in (False, True):
            (hit,) = index.search("kabel", filter={"lang": "de"}, exact=exact)
            assert hit.metadata == {"x": None, "lang": "de"}
        assert index.store.find("a").content.metadata is None
        index.add({"a": Document("", "kabel", {"lang": "de"})})
        assert {hit.id for hit in index.search("kabel", filter={"lang": "de"})} == {"a", "b"}
    assert caplog.text.count("is not an object and is left out; add the document again") == 1


def test_a_closed_index_says_so(own_index):
    index = Index.load(own_index)
    index.close()
    index.close()
    assert repr(index) == f"Index({str(own_index)!r}: closed)"
    for call in (
        lambda: len(index),
        lambda: index.search("kabel"),
        lambda: index.search("kabel", exact=True),
        lambda: index.add({"a": Document("", "kabel")}),
        lambda: index.delete(["a"]),
        lambda: index.describe(),
        lambda: list(index.store),
    ):
        with pytest.raises(OptionError, match=r"the index is closed; Index\.load\(folder\) opens it"):
            call()


def test_the_same_corpus_in_other_words(collection_folder, backbone, tmp_path):
    place = tmp_path / "a"
    shutil.copytree(collection_folder, place / "cur")
    load_encoder(backbone, k=1, shift=0).save_pretrained(str(place / "model"))
    Index.build(place / "model", place / "cur", place / "index").close()
    Index.build(place / "model", place / "cur" / "corpus.jsonl", place / "index").close()
    Index.build(place / "model", place / "cur", place / "index").close()
    place = place.rename(tmp_path / "b")
    with Index.build(place / "model", place / "cur" / "corpus.jsonl", place / "index") as index:
        assert index.changes == Changes()
    (place / "cur").rename(place / "renamed")
    with pytest.raises(OutputError, match=r"another corpus \(.*/b/cur/corpus\.jsonl, not .*/b/renamed\)"):
        Index.build(place / "model", place / "renamed", place / "index")
    load_encoder(backbone, k=3, shift=0).save_pretrained(str(place / "model"))
    with pytest.raises(OutputError, match=r"another model \(what .* holds changed\), corpus") as error:
        Index.build(place / "model", place / "renamed", place / "index")
    assert "fingerprint" not in str(error.value)


def test_a_model_that_is_given_and_is_another(built, backbone, tmp_path):
    built.close()
    with pytest.raises(ModelError, match=f"not the model of .*index, which was built with {tmp_path / 'model'}"):
        _ = Index.load(tmp_path / "index", backbone).queries


@pytest.mark.parametrize("replaced", [True, False])
def test_a_folder_that_was_moved_away_is_closed_in_silence(replaced, own_index, tmp_path, caplog):
    shutil.copytree(own_index, tmp_path / "next")
    index = Index.load(own_index)
    index.add({"late": Document("", "kabel")})
    own_index.rename(tmp_path / "old")
    if replaced:
        (tmp_path / "next").rename(own_index)
    index.close()
    assert not caplog.records
    with Index.load(tmp_path / "old") as moved:
        assert "late" in {hit.id for hit in moved.search("kabel", k=100)}
    if replaced:
        with Index.load(own_index) as other:
            assert other.store.find("late") is None


def test_hits_say_why_there_are_none(own_index):
    with Index.load(own_index) as index:
        index.add({"a": Document("", "kabel", {"lang": "en"})})
        assert repr(index.search("kabel", filter={"lang": "xx"})) == "Hits: empty (no document has lang=xx)"
        assert index.search("kabel", filter={"lang": "en"}).note is None
