import json
import math

import ir_measures
import numpy as np
import pytest
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.evaluation import SparseInformationRetrievalEvaluator

from anysplade import Collection, Document, MeasureError, evaluate, load_collection
from anysplade.evaluation import parse_metrics


def test_effectiveness_and_cost_by_hand(backbone, collection_folder, tmp_path):
    result = evaluate(backbone, collection_folder, output=tmp_path / "out")
    collection = load_collection(collection_folder)
    encoder = SparseEncoder(backbone)
    documents = encoder.encode([d.full_text for d in collection.corpus.values()], convert_to_sparse_tensor=False).numpy()
    queries = encoder.encode(list(collection.queries.values()), convert_to_sparse_tensor=False).numpy()
    scores = queries.astype(np.float64) @ documents.T.astype(np.float64)
    ids = list(collection.corpus)
    gains, reciprocal = [], []
    for i, query_id in enumerate(collection.queries):
        (relevant,) = collection.qrels[query_id]
        rank = 1 + int((scores[i] > scores[i][ids.index(relevant)]).sum())
        gains.append(1 / math.log2(rank + 1) if rank <= 10 else 0)
        reciprocal.append(1 / rank if rank <= 10 else 0)
    assert result.metrics["nDCG@10"] == pytest.approx(np.mean(gains), abs=1e-6)
    assert result.metrics["RR@10"] == pytest.approx(np.mean(reciprocal), abs=1e-6)
    assert result.metrics["R@100"] == 1
    assert result.query_active_dims == pytest.approx((queries > 0).sum(1).mean())
    assert result.document_active_dims == pytest.approx((documents > 0).sum(1).mean())
    assert result.flops == pytest.approx(((queries > 0).mean(0) * (documents > 0).mean(0)).sum())

    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["nDCG@10"] == result.metrics["nDCG@10"]
    run = list(ir_measures.read_trec_run(str(tmp_path / "out" / "run.trec")))
    again = ir_measures.calc_aggregate([ir_measures.nDCG @ 10], collection.qrels, run)
    assert again[ir_measures.nDCG @ 10] == pytest.approx(result.metrics["nDCG@10"], abs=1e-9)


def test_the_same_as_sentence_transformers(backbone, collection_folder, tmp_path):
    collection = load_collection(collection_folder)
    evaluator = SparseInformationRetrievalEvaluator(
        collection.queries,
        {id_: document.full_text for id_, document in collection.corpus.items()},
        {query: set(grades) for query, grades in collection.qrels.items()},
        ndcg_at_k=[10],
        mrr_at_k=[10],
    )
    theirs = evaluator(SparseEncoder(backbone))
    ours = evaluate(backbone, collection, ["nDCG@10", "RR@10"]).metrics
    assert ours["nDCG@10"] == pytest.approx(theirs["dot_ndcg@10"], abs=1e-6)
    assert ours["RR@10"] == pytest.approx(theirs["dot_mrr@10"], abs=1e-6)


def test_bm25_finds_the_words(collection_folder):
    result = evaluate("bm25", collection_folder)
    assert result.metrics["RR@10"] > 0.9
    assert result.query_active_dims is None


def test_one_document(backbone):
    collection = Collection("one", {"d": Document("", "kabel")}, {"q": "kabel"}, {"q": {"d": 1}})
    for model in (backbone, "bm25"):
        assert evaluate(model, collection).metrics["RR@10"] == 1


def test_empty_and_wordless_texts(backbone):
    corpus = {"a": Document("", ""), "b": Document("", "🎈🎈"), "c": Document("", "kabel " * 100_000)}
    collection = Collection("odd", corpus, {"q": "", "r": "🎈"}, {"q": {"a": 1}, "r": {"b": 1}})
    for model in (backbone, "bm25"):
        assert 0 <= evaluate(model, collection).metrics["nDCG@10"] <= 1


@pytest.mark.parametrize(
    "name, hint",
    [
        ("ndcg@10", "nDCG@10"),
        ("nDGC@10", "did you mean nDCG@10"),
        ("recal@100", "R@100"),
        ("xyzzy", "for example"),
        ("nDCG@", "nDCG@10"),
    ],
)
def test_a_misspelt_metric_gets_a_suggestion(name, hint):
    with pytest.raises(MeasureError, match=f"unknown metric '{name}'.*{hint}"):
        parse_metrics([name])
