import json

import pytest
from sentence_transformers import CrossEncoder
from torch import nn

from anysplade import Index, evaluate, evaluate_all
from anysplade.cli import main
from anysplade.data.collections import load_collection
from anysplade.errors import OptionError
from anysplade.evaluation.runs import read_run, write_run
from anysplade.search.fusion import fuse
from tiny import make_static


@pytest.fixture
def runs(collection_folder, tmp_path):
    """Two run files: of BM25, and of its rankings in reverse, cut to two."""
    evaluation = evaluate("bm25", collection_folder)
    write_run(tmp_path / "a.trec", evaluation.run, "a")
    reverse = {query: dict(sorted(found.items(), key=lambda hit: hit[1])[:2]) for query, found in evaluation.run.items()}
    reverse = {query: {id_: -score for id_, score in found.items()} for query, found in reverse.items()}
    write_run(tmp_path / "b.trec", reverse, "b")
    return [str(tmp_path / "a.trec"), str(tmp_path / "b.trec")]


def test_bm25_added_to_a_model_is_what_an_index_searches_with(collection_folder, tmp_path):
    """And the model's own row stays; the stems count in the costs."""
    model, queries = make_static(tmp_path), load_collection(collection_folder).queries
    found = evaluate_all(model, collection_folder, "nDCG@10", lexical=3)
    own, added = found.evaluations
    assert (added.kind, added.model, added.lexical, own.lexical) == ("sparse", f"{model} + 3 bm25", 3.0, None)
    assert added.query_active_dims > own.query_active_dims
    assert added.document_active_dims > own.document_active_dims
    with Index.build(model, collection_folder, tmp_path / "index", lexical=3, language=added.language) as index:
        for id_, text in queries.items():
            hits = {hit.id: hit.score for hit in index.search(text, k=1000, exact=True)}
            assert added.run[id_] == pytest.approx(hits, rel=1e-5)
    with pytest.raises(OptionError, match="above 0"):
        evaluate_all(model, collection_folder, lexical=0)


@pytest.mark.parametrize("method", ["rrf", "wsum"])
def test_a_row_for_the_fusion(runs, collection_folder, tmp_path, method):
    found = evaluate_all(runs, collection_folder, "nDCG@10", fuse=method, output=tmp_path / "out")
    first, second, fused = found.evaluations
    assert (fused.kind, fused.model) == ("fusion", f"{method} of {runs[0]} and {runs[1]}")
    for query, ranking in fused.run.items():
        expected = list(fuse([first.run[query], second.run[query]], method).items())
        assert list(ranking.items()) == expected[: max(len(first.run[query]), len(second.run[query]))]
    assert [c.model for c in found.comparisons] == [second.model, fused.model]
    assert all(c.p_corrected is not None for c in found.comparisons)
    (folder,) = (tmp_path / "out").rglob("3-*")
    assert read_run(folder / "run.trec") == fused.run
    assert json.loads((folder / "evaluation.json").read_bytes())["nDCG@10"] == fused.metrics["nDCG@10"]
    assert evaluate(folder / "run.trec", collection_folder, "nDCG@10").metrics == fused.metrics


def test_costs_by_part(backbone, collection_folder):
    found = evaluate_all(["bm25", backbone], collection_folder, "nDCG@10", fuse="rrf")
    words, model, fused = found.evaluations
    assert (fused.query_active_dims, fused.document_active_dims, fused.flops) == (None, None, None)
    assert [(part["model"], part["flops"]) for part in fused.cost["parts"]] == [("bm25", None), (backbone, model.flops)]
    assert (words.language, model.language, fused.language) == ("none", None, None)  # of invented words


def test_each_row_reranked(runs, collection_folder, teachers, tmp_path):
    options = {"rerank": teachers["cross-encoder"], "rerank_depth": 2, "fuse": "rrf", "output": tmp_path / "out"}
    found = evaluate_all(runs, [collection_folder, collection_folder], "nDCG@10", **options)
    assert [evaluation.kind for evaluation in found.evaluations] == ["run", "run", "fusion", *["reranked"] * 3]
    collection, model = load_collection(collection_folder), CrossEncoder(teachers["cross-encoder"])
    for before, after in zip(found.evaluations[:3], found.evaluations[3:], strict=True):
        assert after.model == f"{before.model} re-ranked by {teachers['cross-encoder']}"
        for query, ranking in after.run.items():
            ids = list(before.run[query])
            pairs = [(collection.queries[query], collection.corpus[id_].full_text) for id_ in ids[:2]]
            scores = dict(zip(ids, model.predict(pairs, activation_fn=nn.Identity()).tolist() if pairs else [], strict=False))
            assert list(ranking) == [*sorted(scores, key=lambda id_: -scores[id_]), *ids[2:]]
            assert list(ranking.values()) == sorted(ranking.values(), reverse=True)
            assert [ranking[id_] for id_ in scores] == pytest.approx(list(scores.values()), abs=1e-4)
        assert after.cost["pairs_per_query"] <= 2
    assert [part["model"] for part in found.evaluations[5].cost["parts"]] == runs
    assert len(list((tmp_path / "out").rglob("run.trec"))) == 6


def test_means_over_collections(runs, collection_folder):
    other = load_collection(collection_folder)
    found = evaluate_all(runs, [collection_folder, other], "nDCG@10", fuse="wsum")
    assert [mean["model"] for mean in found.means] == [evaluation.model for evaluation in found.evaluations[:3]]
    assert found.means[2]["nDCG@10"] == pytest.approx(found.evaluations[2].metrics["nDCG@10"])


def test_commands(runs, collection_folder, teachers, capsys):
    """The notes give the cost by part; compare has the row too."""
    options = ["--metrics", "RR@10", "--fuse", "rrf", "--rerank", teachers["cross-encoder"], "--rerank-depth", "2"]
    assert main(["evaluate", *runs, str(collection_folder), *options]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "on tiny: FLOPS – + – " in printed
    assert "FLOPS – + –, and the cross-encoder's reading of 2 pairs per query" in printed
    assert main(["compare", *runs, "--collection", str(collection_folder), "--fuse", "wsum", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["kind"] for row in found["evaluations"]] == ["run", "run", "fusion"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"fuse": "rrf"}, "`fuse` needs two models"),
        ({"fuse": "sum"}, "'rrf' or 'wsum'"),
        ({"rerank_depth": 0}, "`rerank_depth` is 0"),
        ({"language": "klingon"}, "BM25 has no stemmer"),
    ],
)
def test_faults(collection_folder, options, message):
    with pytest.raises(OptionError, match=message):
        evaluate_all("bm25", collection_folder, **options)
