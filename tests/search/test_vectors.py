"""An index from vectors of other software, their export, and a second process that maps the postings."""

import gzip
import json
import multiprocessing
import signal
from contextlib import closing

import numpy as np
import pytest
from scipy import sparse

from anysplade import DataError, Document, Index, OptionError, OutputError, export_anserini, export_vectors, load_encoder
from anysplade.cli.app import main
from anysplade.search import vector_build
from anysplade.search.documents import EncodedDocument
from anysplade.search.store import Store

TERMS = 40
FORMS = ["v.jsonl", "v.jsonl.gz", "v", "v.npz", "v.parquet"]


def documents(count=60, seed=0):
    random = np.random.default_rng(seed)
    for number in range(count):
        terms = np.sort(random.choice(TERMS, random.integers(0, 8), replace=False)).astype(np.int32)
        weights = random.random(len(terms), np.float32) + np.float32(0.1)
        content = Document("Title" * (number % 2), f"text {number}", {"lang": ["en", "de"][number % 2]} if number % 3 else None)
        yield EncodedDocument(f"d{number}", content, terms, weights)


def queries(seed=1):
    return sparse.random(5, TERMS, 0.2, "csr", dtype=np.float32, random_state=np.random.default_rng(seed))


def found(index, terms=None, k=20, **options):
    """Ids and scores by query; ``terms`` are the numbers in the index of the terms of the queries."""
    rows = []
    for row in queries():
        numbers = row.indices if terms is None else np.array([terms[term] for term in row.indices])
        order = np.argsort(numbers)
        width = max(index.about["vocabulary"], TERMS)
        vector = sparse.csr_matrix((row.data[order], numbers[order], [0, row.nnz]), shape=(1, width))
        rows.append([(hit.id, round(hit.score, 5)) for hit in index.search_vector(vector, k, **options)])
    return rows


def names(count=TERMS):
    return [f"t{term}" for term in range(count)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Ids and scores by query, computed from the vectors."""
    stored = list(documents())
    matrix = np.zeros((len(stored), TERMS))
    for row, document in zip(matrix, stored, strict=True):
        row[document.terms] = document.weights
    scores = (queries() @ matrix.T).round(5)
    return [[(f"d{at}", score[at]) for at in np.argsort(-score, kind="stable")[:20] if score[at] > 0] for score in scores]


def numbers_of(index):
    held = index.queries.term_names
    return [held.index(name) if name in held else index.about["vocabulary"] - 1 for name in names()]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("large", [False, True])
def test_exported_vectors_give_the_same_hits(form, large, reference, tmp_path, monkeypatch):
    monkeypatch.setattr("anysplade.search.store.MOST_IN_ENGINE", 0 if large else 100)
    assert export_vectors(documents(), names(), tmp_path / form) == 60
    with Index.from_vectors(tmp_path / form, tmp_path / "index") as index:
        assert len(index) == index.changes.added == 60
        terms = None if form.endswith(("npz", "parquet")) else numbers_of(index)
        assert (index.store._engine is None) == large
        for options in ({}, {"exact": True}):
            for hits, wanted in zip(found(index, terms, **options), reference, strict=True):
                assert [score for _, score in hits] == pytest.approx([score for _, score in wanted], abs=1e-4)
                assert {id_ for id_, _ in hits} == {id_ for id_, _ in wanted}
        if not form.endswith("npz"):
            filtered = found(index, terms, k=60, filter={"lang": "EN"})
            assert filtered == [[hit for hit in hits if int(hit[0][1:]) % 6 in (2, 4)] for hits in found(index, terms, k=60)]
        with pytest.raises(OptionError, match=r"has no model to encode queries.*search_vector"):
            index.search("anything")
    with Index.from_vectors(tmp_path / form, tmp_path / "index") as index:
        assert index.changes.added == 0
    export_vectors(documents(30), names(), tmp_path / f"other-{form}")
    with pytest.raises(OutputError, match="another index"):
        Index.from_vectors(tmp_path / f"other-{form}", tmp_path / "index")


def test_what_is_exported_again_is_the_same(tmp_path):
    export_vectors(documents(), names(), tmp_path / "a.jsonl")
    with Index.from_vectors(tmp_path / "a.jsonl", tmp_path / "index") as index:
        export_vectors(index.store, index.queries.term_names, tmp_path / "b.jsonl")
        export_vectors(index.store, index.queries.term_names, tmp_path / "b.parquet")
        matrix = sparse.load_npz(tmp_path / "m.npz") if export_vectors(index.store, names(), tmp_path / "m.npz") else None
    first, second = ([json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()] for name in "ab")
    assert first == second
    assert matrix.shape == (60, TERMS)
    assert matrix.nnz == sum(len(document.terms) for document in documents())


def test_the_files_of_anserini_are_read(tmp_path):
    export_anserini(documents(), names(), tmp_path / "lucene")
    with Index.from_vectors(tmp_path / "lucene", tmp_path / "index") as index:
        assert [document.id for document in index.store] == [document.id for document in documents()]


def _fill(folder, source):
    with Index.from_vectors(source, folder):
        pass


def _fill_and_die(folder, source, call, moment):
    """End the process by SIGKILL at the call of a method of the store."""
    import os

    method, calls = getattr(Store, call), []

    def die(*args, **options):
        calls.append(call)
        if len(calls) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*args, **options)

    setattr(Store, call, die)
    vector_build.BATCH = 16
    _fill(folder, source)


@pytest.mark.parametrize(("call", "moment"), [("put", 3), ("add_terms", 1), ("choose_engine", 1), ("optimize", 1), ("close", 1)])
def test_a_killed_build_continues(call, moment, reference, tmp_path):
    export_vectors(documents(), names(), tmp_path / "v.jsonl.gz")
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_fill_and_die, args=(tmp_path / "index", tmp_path / "v.jsonl.gz", call, moment))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with Index.from_vectors(tmp_path / "v.jsonl.gz", tmp_path / "index") as index:
        assert len(index) == 60
        assert [document.id for document in index.store] == [f"d{number}" for number in range(60)]
        hits = found(index, numbers_of(index), exact=True)
        assert [[id_ for id_, _ in row] for row in hits] == [[id_ for id_, _ in row] for row in reference]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"id": "a", "vector": {"x": 1}}', '{"id": "a", "vector": {"x": 1}}'], "duplicate id 'a'"),
        (['{"id": "a", "vector": {"x": -1}}'], "document 'a': its weights must be finite and above 0"),
        (['{"id": "a", "vector": {"x": "1"}}'], 'a weight in "vector" is no number'),
        (['{"vector": {"x": 1}}'], "v.jsonl:1: no id"),
        (['{"id": "a", "contents": "text"}'], 'v.jsonl:1: no "vector"'),
        ([], "no vectors there"),
    ],
)
def test_mistakes_in_lines(lines, message, tmp_path):
    (tmp_path / "v.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=message):
        Index.from_vectors(tmp_path / "v.jsonl", tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_mistakes_in_files(tmp_path):
    for name, message in (("none.npz", "no file of vectors"), ("v.csv", "unknown form")):
        (tmp_path / "v.csv").write_text("")
        with pytest.raises(DataError, match=message):
            Index.from_vectors(tmp_path / name, tmp_path / "index")
    sparse.save_npz(tmp_path / "m.npz", queries())
    with pytest.raises(DataError, match="its ids are missing"):
        Index.from_vectors(tmp_path / "m.npz", tmp_path / "index")
    (tmp_path / "m.ids.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match="not as many ids"):
        Index.from_vectors(tmp_path / "m.npz", tmp_path / "index")
    (tmp_path / "v.jsonl.gz").write_bytes(gzip.compress(b'{"id": "a", "vector": {"x": 1}}')[:-12])
    with pytest.raises(DataError, match="damaged or cut off"):
        Index.from_vectors(tmp_path / "v.jsonl.gz", tmp_path / "other")


def test_a_second_process_maps_the_postings_and_sees_later_changes(tmp_path):
    """It reads from the database only what changed after the postings were written."""
    Store.create(tmp_path / "store")
    with closing(Store(tmp_path / "store", TERMS)) as first, closing(Store(tmp_path / "store", TERMS)) as second:
        first.put(documents())
        first.optimize()
        _agree(first, second)
        assert second._changes()[0].postings.count == 0
        first.put(document._replace(weights=document.weights * 2) for document in documents(7))
        first.delete(["d9", "d10", "nothing"])
        first.put([EncodedDocument("new", Document("", "", {"lang": "en"}), np.array([1], np.int32), np.array([9], np.float32))])
        _agree(first, second)
        assert second._changes()[0].postings.count == 8
        before = list((tmp_path / "store" / "postings").iterdir())
        first.optimize()
        assert before != list((tmp_path / "store" / "postings").iterdir())
        _agree(first, second)
        assert second._changes()[0].postings.count == 0
        first.delete(document.id for document in documents())
        _agree(first, second)
        first.rebuild()
        _agree(first, second)


def _agree(first, second):
    for filter in (None, {"lang": "en"}, {"lang": ["de", "en"]}):
        for row in queries():
            ours, theirs = (store.search(row.indices, row.data, 15, filter) for store in (first, second))
            assert [position for position, _ in ours] == [position for position, _ in theirs]
            assert [score for _, score in ours] == pytest.approx([score for _, score in theirs], rel=1e-5)
    assert second.names(5) == first.names(5)


def test_an_earlier_version_wrote(tmp_path):
    """Its changes are in none of the tables that it does not know, and these are made again."""
    Store.create(tmp_path / "store")
    with closing(Store(tmp_path / "store", TERMS)) as store:
        store.put(documents(20))
        store.optimize()
        store._database.execute("UPDATE writes SET count = count + 1")
        store._database.execute("DELETE FROM tagged")
        with closing(Store(tmp_path / "store", TERMS)) as second:
            assert second.has("values", ["lang=de"])
    with closing(Store(tmp_path / "store", TERMS)) as store, closing(Store(tmp_path / "store", TERMS)) as second:
        assert store._one("SELECT count(*) FROM tagged")
        store.optimize()
        _agree(store, second)


def test_commands(backbone, collection_folder, tmp_path, capsys):
    """Export and index with and without the model; a search by text needs it."""
    load_encoder(backbone, k=1, shift=0).save_pretrained(str(model := tmp_path / "model"))
    Index.build(model, collection_folder, tmp_path / "index").close()
    said = []

    def call(*arguments):
        code = main([*map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        said.append(err)
        return json.loads(out) if code == 0 else code

    hits = call("search", tmp_path / "index", "kabel lodan")["hits"]
    for form in ("v.jsonl", "v.parquet", "v.npz"):
        assert call("export", tmp_path / "index", "--to", "vectors", "--out", tmp_path / form)["documents"] > 2
        assert call("index", model, "--vectors", tmp_path / form, "--out", tmp_path / f"{form}.index")["added"] > 2
        again = call("search", tmp_path / f"{form}.index", "kabel lodan")["hits"]
        assert [(hit["id"], round(hit["score"], 4)) for hit in again] == [(hit["id"], round(hit["score"], 4)) for hit in hits]
    assert call("index", "--vectors", tmp_path / "v.jsonl", "--out", tmp_path / "alone")["model"] is None
    assert call("search", tmp_path / "alone", "kabel") == 2
    assert "has no model to encode queries" in said[-1]
    for arguments, message in (
        (("index", "--out", tmp_path / "x"), "index needs MODEL"),
        (("index", model, "--out", tmp_path / "x"), "index needs CORPUS"),
        (("index", "--vectors", tmp_path / "v.npz", "--out", tmp_path / "x", "--top-k", 3), "--top-k has no meaning"),
        (("index", "--vectors", tmp_path / "v.npz", "--out", tmp_path / "x", "--lexical", 4), "--lexical has no meaning"),
        (("index", "--vectors", tmp_path / "v.npz", "--out", tmp_path / "x", "--with-bm25"), "--with-bm25 has no meaning"),
        (("serve", tmp_path / "alone", "--port", 0), "has no model to encode queries"),
        (("search", tmp_path / "alone", "--queries", collection_folder, "--out", tmp_path / "x"), "has no model to encode"),
        (("evaluate", tmp_path / "alone", collection_folder), "has no model to encode queries"),
        (("export", tmp_path / "index", "--to", "vectors", "--out", tmp_path / "v.csv"), "unknown form of vectors"),
    ):
        assert call(*arguments) == 2
        assert message in said[-1]
        assert said[-1].count("\n") == 1
