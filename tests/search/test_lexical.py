import json
import sqlite3
from collections import Counter

import numpy as np
import pytest

from anysplade import (
    DataError,
    Document,
    Index,
    OptionError,
    OutputError,
    evaluate,
    evaluate_all,
    export_anserini,
    load_collection,
    search_many,
)
from anysplade.cli import main
from anysplade.search.analysis import Analyzer
from anysplade.search.bm25 import BM25
from anysplade.search.database import Database
from anysplade.search.fusion import fuse
from anysplade.search.index import Changes
from anysplade.search.remote import RemoteIndex
from tiny import make_static, no_encoder

BETA = 4.0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_static(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, collection_folder):
    """An index whose scores have BM25."""
    place = tmp_path_factory.mktemp("lexical") / "index"
    Index.build(model, collection_folder, place, lexical=BETA).close()
    return place


@pytest.fixture
def small(model, tmp_path):
    """A corpus file of five documents, and the function that indexes it."""
    path = tmp_path / "corpus.jsonl"

    def build(texts, **options):
        rows = [{"_id": id_, "text": text, "metadata": {"lang": id_[0]}} for id_, text in texts.items()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Index.build(model, path, tmp_path / "index", **options)

    return build


TEXTS = {"a1": "the runner runs", "a2": "kabel kabel lodan", "b1": "running kabel", "b2": "lodan lodan mifil", "b3": ""}


def frequencies(index):
    """The document frequencies in the index, without zeros, and those of its texts."""
    with sqlite3.connect(index.folder / "documents.sqlite") as database:
        stored = dict(database.execute("SELECT stem, df FROM stems WHERE df"))
    tokens = Analyzer().tokens([document.content.full_text for document in index.store])
    names = {number: stem for stem, number in tokens.vocab.items()}
    return stored, Counter(names[number] for ids in tokens.ids for number in set(ids))


def test_scores_are_the_sum(folder, model, collection_folder):
    collection = load_collection(collection_folder)
    texts = [document.full_text for document in collection.corpus.values()]
    bm25, every = BM25(texts), np.arange(len(texts))
    run = evaluate(model, collection).run
    with Index.load(folder) as index:
        for id_, query in collection.queries.items():
            scores = zip(collection.corpus, bm25.score(query, every).tolist(), strict=True)
            expected = {document: run[id_].get(document, 0) + BETA * score for document, score in scores}
            found = {hit.id: hit.score for hit in index.search(query, k=40)}
            assert found == pytest.approx({document: score for document, score in expected.items() if score > 0}, rel=1e-5)
            assert found == pytest.approx({hit.id: hit.score for hit in index.search(query, k=40, exact=True)}, rel=1e-5)
            alone = index.search_vector(index.queries.encode([query]), k=40)
            assert {hit.id: hit.score for hit in alone} == pytest.approx(run[id_], rel=1e-5)


@pytest.mark.parametrize("method", ["rrf", "wsum"])
def test_a_fused_search_is_the_fusion_of_two_runs(folder, model, collection_folder, method):
    collection = load_collection(collection_folder)
    runs = {"model": evaluate(model, collection).run, "bm25": evaluate("bm25", collection).run}
    with no_encoder(), Index.load(folder) as index:
        for id_, query in collection.queries.items():
            fused = fuse([run[id_] for run in runs.values()], method)
            hits = index.search(query, k=25, fuse=method, explain=True)
            assert [hit.id for hit in hits] == list(fused)[:25]
            assert [hit.score for hit in hits] == pytest.approx(list(fused.values())[:25], abs=1e-4)  # scaled: rounding grows
            for hit in hits:
                assert hit.parts.keys() == {name for name, run in runs.items() if hit.id in run[id_]}
                for name, part in hit.parts.items():
                    assert list(runs[name][id_])[part.rank - 1] == hit.id
                    assert part.score == pytest.approx(runs[name][id_][hit.id], rel=1e-5)
                    products = sum(match.product for match in hit.terms if match.lexical == (name == "bm25"))
                    assert part.score == pytest.approx(products, rel=1e-5)


def test_words_of_the_query_explain_stems(small):
    with small(TEXTS, lexical=1) as index:
        hits = index.search("Runs, runs the lodan", explain=True)
        assert {hit.id: [match.term for match in hit.terms if match.lexical] for hit in hits if hit.id in ("b1", "b2")} == {
            "b1": ["runs"],
            "b2": ["lodan"],
        }
        for hit in hits:
            assert hit.score == pytest.approx(sum(match.product for match in hit.terms))
        about = index.describe()
        assert about["document_lexical_dims"] == 8 / 5
        assert about["document_active_dims"] == (index.store.postings - 8) / 5
        assert index.term_names[about["vocabulary"] :] == ["stem:runner", "stem:run", "stem:kabel", "stem:lodan", "stem:mifil"]


def test_changes_keep_the_frequencies(small):
    with small(TEXTS, with_bm25=True) as index:
        length = index.about["average_length"]
        assert length == 10 / 5
        index.add({"a1": Document("Lodan", "kabel"), "new": Document("", "mifil zukop")})
        assert index.delete(["b1", "nobody"]) == 1
        stored, expected = frequencies(index)
        assert stored == expected == {"lodan": 3, "kabel": 2, "mifil": 2, "zukop": 1}
        assert [hit.id for hit in index.search("running", fuse="rrf") if "bm25" in hit.parts] == []
    with Index.load(index.folder) as index:
        assert frequencies(index)[0] == expected
        assert index.about["average_length"] == length


def test_an_update_after_a_crash(small, tmp_path, monkeypatch):
    small(TEXTS, lexical=2).close()
    changed = TEXTS | {"a1": "kabel", "b2": "zukop", "c": "lodan runs"}
    insert = Database._insert

    def fail(*arguments):
        insert(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Database, "_insert", fail)
        with pytest.raises(KeyboardInterrupt):
            small(changed, lexical=2)
    with Index.load(tmp_path / "index") as index:
        assert frequencies(index)[0] == frequencies(index)[1]
    with small(changed, lexical=2) as index:
        assert index.changes == Changes(added=1, replaced=2)
        stored, expected = frequencies(index)
        assert stored == expected == {"kabel": 3, "lodan": 2, "run": 2, "zukop": 1}


def test_filters_and_depth_hold_for_both_rankings(small, monkeypatch):
    with small(TEXTS, with_bm25=True) as index:
        hits = index.search("kabel lodan", fuse="rrf", filter={"lang": "b"})
        assert {hit.id for hit in hits} <= {"b1", "b2", "b3"}
        assert {name for hit in hits for name in hit.parts} == {"model", "bm25"}
        monkeypatch.setattr("anysplade.search.index.DEPTH", 1)
        assert {part.rank for hit in index.search("kabel lodan", fuse="rrf") for part in hit.parts.values()} == {1}


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"fuse": "wsum"}, {"filter": {"lang": "b"}}])
def test_many_queries_find_what_each_finds(small, options):
    """Of a search, of a second process that maps the postings, of a copy, and after the postings were written again."""
    queries = {"1": "Runs the lodan", "2": "kabel mifil", "3": "the"}
    with small(TEXTS, lexical=BETA) as index:

        def found(one):
            return dict(search_many(one, queries, 9, **options))

        def alike(rankings):
            return {id_: pytest.approx(ranking, rel=1e-5, abs=1e-4) for id_, ranking in rankings.items()}

        expected = {id_: {hit.id: hit.score for hit in index.search(text, 9, **options)} for id_, text in queries.items()}
        assert expected["1"]
        assert found(index) == alike(expected)
        index.add({"b1": Document("", "runs lodan", {"lang": "b"}), "new": Document("", "mifil")})
        index.snapshot(index.folder.with_name("copy"))
        changed = found(index)
        assert changed != alike(expected)
        with Index.load(index.folder) as second:
            assert second.store.searches_exactly
            assert found(second) == alike(changed)
            index.store.optimize()
            assert found(second) == alike(changed)
        index.store.rebuild()
        assert found(index) == alike(changed)
    with Index.load(index.folder.with_name("copy")) as copy:
        assert found(copy) == alike(changed)
        assert frequencies(copy)[0] == frequencies(copy)[1]


def test_an_index_is_evaluated_with_its_stems(folder, model, collection_folder):
    exact, deployed, alike = evaluate_all([model, folder], collection_folder, "nDCG@10", lexical=BETA).evaluations
    assert deployed.index["lexical"] == alike.lexical == BETA
    assert deployed.metrics == pytest.approx(alike.metrics)
    assert (deployed.flops, deployed.document_active_dims) == pytest.approx((alike.flops, alike.document_active_dims))
    assert deployed.document_active_dims > exact.document_active_dims
    for id_, ranking in alike.run.items():
        assert deployed.run[id_] == pytest.approx(ranking, rel=1e-4)


def test_mistakes(small, model, static_index, collection_folder, tmp_path):
    with (
        Index.load(static_index) as plain,
        pytest.raises(OptionError, match=r"has no stems for BM25; build another index with `with_bm25`"),
    ):
        plain.search("kabel", fuse="rrf")
    small(TEXTS, lexical=2).close()
    with pytest.raises(OutputError, match=r"another lexical \(2.0, not 3.0\)"):
        small(TEXTS, lexical=3)
    with pytest.raises(OutputError, match=r"another lexical \(2.0, not None\); name"):
        small(TEXTS)
    with Index.load(tmp_path / "index") as index:
        with pytest.raises(OptionError, match="`fuse` is 'sum'"):
            index.search("kabel", fuse="sum")
        with pytest.raises(OptionError, match="give it as `text`"):
            index.search_vector(index.queries.encode(["kabel"]), fuse="rrf")
        with pytest.raises(DataError, match="outside of the vocabulary"):
            index.store.put([index.store.find("a1")])
    with pytest.raises(OptionError, match="`lexical` is -1"):
        small(TEXTS, lexical=-1)
    for options in ({"lexical": 4}, {"with_bm25": True}):
        with pytest.raises(OptionError, match="only an index in a folder"):
            RemoteIndex.build(model, collection_folder, "qdrant://localhost:6333/docs", tmp_path, **options)


def test_an_index_of_an_earlier_version(small, tmp_path):
    """It has no table of stems, and does not say that it has none."""
    small(TEXTS).close()
    with sqlite3.connect(tmp_path / "index" / "documents.sqlite") as database:
        database.execute("DROP TABLE stems")
    about = json.loads((tmp_path / "index" / "index.json").read_text())
    del about["lexical"], about["with_bm25"]
    (tmp_path / "index" / "index.json").write_text(json.dumps(about))
    with small(TEXTS | {"new": "kabel"}) as index:
        assert index.changes == Changes(added=1)
        assert index.search("kabel", k=9, exact=True)
        assert index.delete(["a1"]) == 1


def test_exported_stems_are_terms_of_their_own(folder, tmp_path):
    with Index.load(folder) as index:
        export_anserini(index.store, index.term_names, tmp_path / "lucene", quantization=1000)
        (row,) = index.encode_queries(["kabel kabel zzz"])
        names, document = index.term_names, index.search("kabel")[0].id
    vectors = {line["id"]: line["vector"] for line in map(json.loads, (tmp_path / "lucene" / "0000.jsonl").open())}
    assert {"stem:kabel", "kabel"} <= vectors[document].keys()
    assert [names[term] for term in row.indices if names[term].startswith("stem:")] == ["stem:kabel"]
    assert len(set(names)) == len(names) == row.shape[1]


def test_the_command_line(model, collection_folder, tmp_path, capsys):
    def call(*arguments):
        assert main([*map(str, arguments)]) == 0
        return capsys.readouterr().out

    out = call("index", model, collection_folder, "--out", tmp_path / "index", "--with-bm25")
    assert "active dims and 12 stems per document" in out
    found = json.loads(call("search", tmp_path / "index", "kabel lodan", "--fuse", "wsum", "--json"))
    assert found["fuse"] == "wsum"
    assert found["hits"][0]["parts"]["bm25"]["rank"] >= 1
    text = call("search", tmp_path / "index", "kabel lodan", "--fuse", "rrf")
    assert "bm25 rank 1 (" in text
    assert '"kabel" ' in text
    assert main(["search", str(tmp_path / "index"), "kabel", "--fuse", "max"]) == 2
