import json

import numpy as np
import pytest

from anysplade import DataError, Index, OptionError, evaluate, evaluate_all, load_collection
from anysplade.cli import main


@pytest.fixture(scope="module")
def pruned(teachers, collection_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned") / "index"
    Index.build(teachers["sparse"], collection_folder, folder, top_k=2).close()
    return folder


def test_an_index_equals_its_exact_model(teachers, collection_folder, tmp_path):
    Index.build(teachers["sparse"], collection_folder, tmp_path / "index").close()
    exact, deployed = (evaluate(one, collection_folder) for one in (teachers["sparse"], tmp_path / "index"))
    assert deployed.metrics == pytest.approx(exact.metrics)
    assert (deployed.kind, deployed.model_fingerprint) == ("index", exact.model_fingerprint)
    assert deployed.flops == pytest.approx(exact.flops)
    assert deployed.index["engine"] == "qdrant-edge"
    assert deployed.index["documents_in_collection"] == deployed.index["documents"] == 40
    for id_, ranking in exact.run.items():
        assert deployed.run[id_] == pytest.approx(ranking, rel=1e-4)


def test_what_is_deployed_is_compared_with_the_exact_model(pruned, collection_folder, capsys):
    assert main(["evaluate", str(collection_folder), "--index", str(pruned), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    exact, deployed = found["evaluations"]
    assert (exact["kind"], deployed["kind"], deployed["index"]["top_k"]) == ("sparse", "index", 2)
    assert deployed["document_active_dims"] <= 2 < exact["document_active_dims"]
    assert {one["model"] for one in found["comparisons"]} == {str(pruned)}
    assert main(["evaluate", str(collection_folder), "--index", str(pruned)]) == 0
    assert "is an index: documents in float32 with the 2 largest weights" in capsys.readouterr().out


def test_an_index_with_all_other_options(teachers, pruned, collection_folder):
    """An index and its exact model are no seeds, and only the index is fused; seeds with BM25 added are those of another model."""
    seed = teachers["sparse"]
    options = {"lexical": 3, "fuse": "rrf", "rerank": teachers["cross-encoder"], "rerank_depth": 1}
    found = evaluate_all(["bm25", seed, seed], collection_folder, "nDCG@10", index=pruned, seeds=True, **options)
    kinds = ["sparse", "index", "bm25", "sparse", "sparse", "sparse", "sparse", "sparse", "fusion"]
    assert [row.kind for row in found.evaluations] == [*kinds, *["reranked"] * len(kinds)]
    assert [row.lexical for row in found.evaluations[:9]] == [None] * 5 + [3] * 3 + [None]
    assert found.evaluations[8].model == f"rrf of {pruned} and bm25 and {seed} and {seed}"
    assert [row["model"] for row in found.means] == ["mean of 2", "mean of 2 + 3 bm25"]
    for row, seeds in zip(found.means, (found.evaluations[4], found.evaluations[7]), strict=True):
        assert row["nDCG@10"] == pytest.approx(seeds.metrics["nDCG@10"])
    assert [(over.baseline, over.lexical, over.seeds) for over in found.seed_comparisons] == [("bm25", None, 2), ("bm25", 3, 2)]
    assert all(over.p_corrected >= over.p for over in found.seed_comparisons)
    with pytest.raises(OptionError, match="`fuse` needs two models"):
        evaluate_all([], collection_folder, index=pruned, fuse="rrf")


def test_documents_that_do_not_match_are_said(pruned, collection_folder, caplog):
    collection = load_collection(collection_folder)
    judged = {id_ for grades in collection.qrels.values() for id_ in grades}
    with Index.load(pruned) as index:
        gone = [id_ for id_ in collection.corpus if id_ not in judged] or list(collection.corpus)
        assert index.delete(gone[:8]) == len(gone[:8])
    found = evaluate_all(pruned, collection, "nDCG@10")
    assert found.evaluations[0].index["documents"] == 40 - len(gone[:8])
    assert "of 40 documents of tiny are in the index" in caplog.text
    other = {f"other-{id_}": document for id_, document in collection.corpus.items()}
    with pytest.raises(DataError, match=r"none of the \d+ documents of the index .* name the collection that was indexed"):
        evaluate(pruned, type(collection)("other", other, collection.queries, collection.qrels))
    with pytest.raises(OptionError, match="leave out `max_length`"):
        evaluate(pruned, collection, max_length=3)
    with pytest.raises(OptionError, match="leave out `passages`"):
        evaluate(pruned, collection, passages="8")


def test_costs_are_counted_with_later_changes(teachers, collection_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("anysplade.search.store.MOST_IN_ENGINE", 10)
    with Index.build(teachers["sparse"], collection_folder, tmp_path / "index") as index:
        assert index.store.searches_exactly  # too many documents for an engine
        for _ in range(2):
            documents = list(index.store)
            frequency, active = index.store.counts()
            assert active.tolist() == [len(document.terms) for document in documents]
            wanted = np.bincount(np.concatenate([document.terms for document in documents]), minlength=index.store.width)
            assert frequency.tolist() == wanted.tolist()
            index.delete([documents[3].id])
        for most in (39, 10):
            monkeypatch.setattr("anysplade.search.store.MOST_IN_ENGINE", most)
            index.store.choose_engine()
            assert index.store.searches_exactly == (most == 10)
            assert (tmp_path / "index" / "engine").exists() == (most == 39)
