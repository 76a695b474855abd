import bz2
import gzip
import json
import math
import re
import shutil
import time
from pathlib import Path

import ir_measures
import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.sparse_encoder.evaluation import SparseInformationRetrievalEvaluator

import anysplade.model.encoding as encoding
from anysplade import Collection, DataError, Document, MeasureError, OutputError, evaluate, load_collection, load_encoder
from anysplade.cli.evaluation import evaluations_parts
from anysplade.errors import OptionError
from anysplade.evaluation.costs import search_cost
from anysplade.evaluation.evaluations import curve
from anysplade.evaluation.grid import evaluate_all
from anysplade.evaluation.measures import measure, parse_metrics
from anysplade.evaluation.runs import read_run, write_run
from anysplade.model.dense import open_dense
from anysplade.model.pruning import prune
from processes import preloaded_context
from tiny import make_lexical


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
    "names",
    [
        ["RR@10", "MRR@10", "nDCG@10", "NDCG@10"],
        ["P@3", "Precision@3", "P(rel=1)@3"],
        ["MAP", "AP", " AP(rel=1) "],
        ["Recall@5", "R@5", "Recall@5"],
        ["nDCG@10", "nDCG(dcg='log2')@10", "nDCG @10", "nDCG(dcg='exp-log2')@10"],
        ["ERR@10", "RPrec", "Rprec"],
    ],
)
def test_every_name_of_a_measure_has_its_value(names):
    qrels = {"a": {"d1": 1, "d2": 2}, "b": {"d1": 1}, "not-found": {"d3": 1}}
    run = {"a": {"d0": 3.0, "d2": 2.0, "d1": 1.0}, "b": {"d1": 1.0}}
    means, values = measure(parse_metrics(names), qrels, run)
    assert list(means) == list(values) == list(dict.fromkeys(names))
    for name in names:
        alone = ir_measures.parse_measure(name.strip())
        numbered = ({str(i): of.get(id_, {}) for i, id_ in enumerate(qrels)} for of in (qrels, run))
        expected = {metric.query_id: metric.value for metric in ir_measures.iter_calc([alone], *numbered)}
        assert list(values[name].values()) == pytest.approx([expected.get(str(i), 0) for i in range(3)])
        assert means[name] == pytest.approx(np.mean(list(values[name].values())))
        assert means[name] > 0


def test_what_gdeval_cannot_compute_is_one_line():
    with pytest.raises(MeasureError, match=r"ERR@10: gdeval, .* failed; it takes grades up to 4"):
        measure(parse_metrics(["ERR@10"]), {"a": {"d1": 5}}, {"a": {"d1": 1.0}})


@pytest.mark.parametrize(
    "queries, documents, warnings",
    [
        (20, ["d{}"], []),
        (18, ["d{}"], []),
        (3, ["d{}"], ["only 3 of 20 queries of tiny are in the run (15 %; "]),
        (20, ["d{}", "other{}"], ["only 20 of 40 documents of the run are in tiny (50 %; 'other"]),
        (
            1,
            ["d{}", "x{}", "y{}"],
            ["only 1 of 20 queries of tiny are in the run (5 %; ", "only 1 of 3 documents of the run are in"],
        ),
    ],
)
def test_a_run_that_hardly_belongs_to_the_collection(queries, documents, warnings, collection_folder, tmp_path, caplog):
    rows = [f"q{i} Q0 {form.format(i)} 1 1 x\n" for i in range(queries) for form in documents]
    rows += [f"unjudged{i} Q0 other{i} 1 1 x\n" for i in range(100)]  # of no matter
    (tmp_path / "a.run").write_text("".join(rows))
    evaluate(tmp_path / "a.run", collection_folder)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == len(warnings)
    assert all(warning in line for warning, line in zip(warnings, said, strict=True))


@pytest.mark.parametrize(
    "name, hint",
    [
        ("ndcg@10", "nDCG@10"),
        ("nDGC@10", "did you mean nDCG@10"),
        ("recal@100", "R@100"),
        ("xyzzy", "for example"),
        ("nDCG@", "nDCG@10"),
        ("nDCG@0", "nDCG@10"),  # trec_eval would end the process
        ("P@0", "P@10"),
        ("Judged@0", "Judged@10"),
        ("nDCG@-1", "nDCG@10"),
        ("nDCG@1.5", "nDCG@10"),
        ("nDCG@True", "nDCG@10"),
        ("R@99999999999", "for example"),
        ("P", "P@10"),
        ("Success", "Success@10"),
        ("P(rel=0)@5", "P@5"),
        ("AP(rel='x')", "AP"),
        ("AP(rel=1.5)", "AP"),
        ("nDCG(gains='x')@5", "nDCG@5"),
        ("IPrec", "for example"),
        ("", "for example"),
        ("nDCG@10 RR@10", "nDCG@10"),
    ],
)
def test_a_misspelt_metric_gets_a_suggestion(name, hint):
    with pytest.raises(MeasureError, match=rf"unknown metric {re.escape(repr(name))}.*{hint}"):
        parse_metrics([name])


def test_a_metric_that_nothing_computes_is_refused_before_the_work():
    with pytest.raises(MeasureError, match="metric 'RBP@10': no installed library computes it"):
        parse_metrics(["nDCG@10", "RBP@10"])


def theirs(collection, run_file, tied):
    """trec_eval's own measures, from the files as they were written; with ties, which it breaks by id, from the ranks in them."""
    with open(run_file) as file:
        run = pytrec_eval.parse_run(file)
    if tied:
        run = {q: dict(zip(ranking, range(len(ranking), 0, -1), strict=True)) for q, ranking in run.items()}
    evaluator = pytrec_eval.RelevanceEvaluator(collection.qrels, {"ndcg_cut_10", "recall_100", "recall_1000", "P_5", "map"})
    values = evaluator.evaluate(run)
    means = {
        name: np.mean([values.get(q, {}).get(name, 0) for q in collection.qrels])
        for name in ("ndcg_cut_10", "recall_100", "P_5", "map")
    }
    # trec_eval has no cut-off for the reciprocal rank: it gets the ten highest, ties by id as trec_eval orders them.
    top = {q: dict(sorted(ranking.items(), key=lambda item: (item[1], item[0]), reverse=True)[:10]) for q, ranking in run.items()}
    first = pytrec_eval.RelevanceEvaluator(collection.qrels, {"recip_rank"}).evaluate(top)
    return means | {"recip_rank": np.mean([first.get(q, {}).get("recip_rank", 0) for q in collection.qrels])}


@pytest.mark.parametrize("model", ["bm25", "model"])
def test_trec_eval_agrees_to_the_last_digit(model, backbone, collection_folder, tmp_path):
    collection = load_collection(collection_folder)
    graded = {q: grades | {f"d{i + 20}": 2, f"d{(i * 7) % 40}": -1} for i, (q, grades) in enumerate(collection.qrels.items())}
    collection = Collection("graded", collection.corpus, collection.queries, graded)
    ours = evaluate(
        backbone if model == "model" else model, collection, ["nDCG@10", "R@100", "P@5", "AP", "RR@10"], output=tmp_path / "out"
    ).metrics
    reference = theirs(collection, tmp_path / "out" / "run.trec", tied=model == "bm25")
    names = {"nDCG@10": "ndcg_cut_10", "R@100": "recall_100", "P@5": "P_5", "AP": "map", "RR@10": "recip_rank"}
    for name, their_name in names.items():
        assert ours[name] == pytest.approx(reference[their_name], abs=1e-9), name
    per_query = json.loads((tmp_path / "out" / "per_query.json").read_text())
    assert np.mean(list(per_query["nDCG@10"].values())) == pytest.approx(ours["nDCG@10"], abs=1e-12)


def test_a_run_file_read_again_measures_the_same(backbone, collection_folder, tmp_path):
    first = evaluate(backbone, collection_folder, output=tmp_path / "out")
    again = evaluate(tmp_path / "out" / "run.trec", collection_folder)
    assert again.metrics == first.metrics
    assert again.per_query == first.per_query
    assert again.query_active_dims is None


TIED = ["nDCG@10", "nDCG", "RR@10", "RR", "AP", "AP@10", "P@5", "R@5", "R@100", "R@1000", "Success@1", "Success@5", "Rprec"]
TIED += ["Judged@5"]


def by_rank(rank):
    """What each of TIED gives for one relevant document at this rank."""
    gain = 1 / math.log2(rank + 1)
    within = {f"R@{k}": float(rank <= k) for k in (5, 100, 1000)}
    first_ten = {"nDCG@10": gain, "RR@10": 1 / rank, "AP@10": 1 / rank}
    return (
        within
        | {name: value * (rank <= 10) for name, value in first_ten.items()}
        | {"nDCG": gain, "RR": 1 / rank, "AP": 1 / rank, "P@5": (rank <= 5) / 5, "Judged@5": (rank <= 5) / 5}
        | {"Success@1": float(rank == 1), "Success@5": float(rank <= 5), "Rprec": float(rank == 1)}
    )


@pytest.mark.parametrize("model", ["bm25", "model", "written"])
@pytest.mark.parametrize("step", [1, -1], ids=["ids rise", "ids fall"])
@pytest.mark.parametrize("place", [0, 2, 7, 30])
def test_documents_of_equal_scores_are_ranked_as_in_the_corpus(model, step, place, backbone, tmp_path):
    ids = [f"d{i:02}" for i in range(40)][::step]
    corpus = dict.fromkeys(ids, Document("", "kabel lodan"))
    collection = Collection("tied", corpus, {"q": "kabel"}, {"q": {ids[place]: 1}})
    found = evaluate("bm25" if model == "bm25" else backbone, collection, TIED, output=tmp_path)
    if model == "written":
        found = evaluate(tmp_path / "run.trec", collection, TIED)
    assert list(found.run["q"]) == ids
    assert found.metrics == pytest.approx(by_rank(place + 1))


def test_the_first_of_equal_documents_are_kept_at_the_depth(backbone):
    corpus = {f"d{i}": Document("", "kabel lodan") for i in range(60)} | {"other": Document("", "rajim")}
    collection = Collection("tied", corpus, {"q": "kabel"}, {"q": {"d3": 1}})
    for model in ("bm25", backbone):
        assert list(evaluate(model, collection, depth=5).run["q"]) == [f"d{i}" for i in range(5)]


def test_scores_that_differ_by_less_than_float32_do_not_tie(tmp_path):
    """trec_eval compares in float32; what ranked the documents is float64."""
    collection = Collection("c", {"a": Document("", "x"), "b": Document("", "y")}, {"q": "x"}, {"q": {"a": 1}})
    write_run(tmp_path / "a.run", {"q": {"a": 1 + 1e-12, "b": 1.0}}, "model")
    assert set(evaluate(tmp_path / "a.run", collection, TIED).metrics.items()) >= {("nDCG@10", 1.0), ("RR@10", 1.0), ("AP", 1.0)}


def test_a_run_file_is_ordered_by_score_and_then_by_rank(tmp_path):
    (tmp_path / "a.run").write_text("q Q0 low 1 0.5 x\nq Q0 third 4 2 x\nq Q0 second 3 2 x\nq Q0 first 9 3 x\nq Q0 fourth 4 2 x\n")
    assert list(read_run(tmp_path / "a.run")["q"]) == ["first", "second", "third", "fourth", "low"]


@pytest.mark.parametrize(
    "model, tag",
    [
        ("bm25", "bm25"),
        ("out/my run/model", "out-my-run-model"),
        ("naver/splade-v3", "naver-splade-v3"),
        ("été", "été"),
        ("/", "unnamed"),
    ],
)
def test_a_run_is_tagged_with_the_name_of_its_model(model, tag, tmp_path):
    write_run(tmp_path / "a.run", {"q": {"a": 1.0}}, model)
    assert (tmp_path / "a.run").read_text() == f"q Q0 a 1 1.0 {tag}\n"


@settings(max_examples=60, deadline=None)
@given(
    rankings=st.dictionaries(
        st.sampled_from("qrs"),
        st.dictionaries(st.sampled_from("abcdefgh"), st.sampled_from([0.5, 1.0, 1.0 + 1e-9, 2.0]), min_size=1),
        min_size=1,
    )
)
def test_a_run_with_ties_written_and_read_is_the_same(rankings, tmp_path_factory):
    run = {q: dict(sorted(ranking.items(), key=lambda item: -item[1])) for q, ranking in rankings.items()}
    path = tmp_path_factory.mktemp("run") / "a.run"
    write_run(path, run, "model")
    assert [(q, list(ranking.items())) for q, ranking in read_run(path).items()] == [(q, list(r.items())) for q, r in run.items()]


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "the run is empty"),
        ("q0 Q0 d0 1\n", "run:1: 4 columns; a TREC run has"),
        ("q0 Q0 d0 1 high x\n", "run:1: the score 'high' is not a number"),
        ("q0 Q0 d0 1 nan x\n", "run:1: the score 'nan' is not a number"),
        ("q0 Q0 d0 first 1 x\n", "run:1: the rank 'first' is not a number"),
        ("q0 Q0 d0 1 2 x\nq0 Q0 d0 2 1 x\n", "run:2: duplicate document 'd0'"),
        (
            "other Q0 d0 1 2 x\n",
            r"none of the 20 queries of tiny are in the run \('q0' is missing\); name the collection",
        ),
        ("q0 Q0 one 1 2 x\nq0 Q0 two 2 1 x\n", r"none of the 2 documents of the run are in tiny \('one' is missing\); name"),
        ("q0 Q0 one 1 2 x\nother Q0 d0 1 2 x\n", r"none of the 1 documents of the run are in tiny \('one' is missing\); name"),
    ],
)
def test_faulty_run_files(content, message, collection_folder, tmp_path):
    (tmp_path / "a.run").write_text(content)
    with pytest.raises(DataError, match=message):
        evaluate(tmp_path / "a.run", collection_folder)


@pytest.mark.parametrize("name", ["run.tsv", "run.out", "run", "run.TXT.gz", "run.txt.bz2", "run[1].res", "bm25.jsonl"])
def test_a_run_file_is_known_by_what_is_in_it(name, tmp_path):
    """White space in the sense of C separates its columns; an id can have other characters."""
    collection = Collection(
        "c", {"a\u00a0\x85b": Document("", "x"), "c": Document("", "y")}, {"q": "x"}, {"q": {"a\u00a0\x85b": 1}}
    )
    data = "q\tQ0 a\u00a0\x85b  1 2.5 tag\r\nq Q0 c 2 1 tag\r\n".encode()
    compress = {".gz": gzip.compress, ".bz2": bz2.compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(compress(data))
    assert evaluate(str(tmp_path / name), collection, ["RR@10"]).run == {"q": {"a\u00a0\x85b": 2.5, "c": 1.0}}


def test_a_folder_or_file_named_bm25(collection_folder, tmp_path, monkeypatch, caplog):
    shutil.copytree(collection_folder, tmp_path / "bm25")
    monkeypatch.chdir(tmp_path)
    found = evaluate_all(["bm25", "bm25-unstemmed"], "./bm25", ["RR@10"]).evaluations
    assert [(evaluation.model, evaluation.collection) for evaluation in found] == [("bm25", "bm25"), ("bm25-unstemmed", "bm25")]
    assert "bm25: read as the built-in name, not as the file or folder here; write ./bm25 for that" in caplog.text
    write_run(tmp_path / "bm25-unstemmed", found[1].run, "bm25-unstemmed")
    assert evaluate("./bm25-unstemmed", "./bm25", ["RR@10"]).vectors is None
    assert evaluate("bm25-unstemmed", "./bm25", ["RR@10"]).model == "bm25-unstemmed"
    assert "write ./bm25-unstemmed for that" in caplog.text


def test_a_query_is_not_its_own_hit():
    """As in ArguAna and Quora, where queries are documents; an id that two texts share by chance means nothing."""
    corpus = {"1": Document("", "kabel lodan mifil"), "2": Document("", "kabel lodan"), "3": Document("", "rajim")}
    queries = {"1": "kabel lodan mifil", "3": "kabel"}
    result = evaluate("bm25", Collection("c", corpus, queries, {"1": {"2": 1}, "3": {"2": 1}}), ["RR@10"], depth=1)
    assert result.run["1"] == {"2": pytest.approx(result.run["1"]["2"])}
    assert result.metrics["RR@10"] == 1
    assert result.self_matches == 1


def test_ids_that_a_run_file_cannot_hold(backbone, tmp_path):
    collection = Collection("c", {"a b": Document("", "kabel")}, {"q": "kabel"}, {"q": {"a b": 1}})
    assert evaluate("bm25", collection).queries == 1
    with pytest.raises(OutputError, match="document id 'a b': white space"):
        evaluate("bm25", collection, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_extremes_give_no_nan(backbone, tmp_path):
    """An empty query, a query whose relevant document is not there, a ranking deeper than the corpus, a model of no terms."""
    corpus = {"a": Document("", "kabel"), "b": Document("", "lodan")}
    queries = {"empty": "", "lost": "kabel", "none": "lodan", "found": "kabel"}
    qrels = {"empty": {"a": 1}, "lost": {"gone": 1}, "none": {"a": 0, "b": -1}, "found": {"a": 1}}
    collection = Collection("c", corpus, queries, qrels)
    dead = load_encoder(backbone, k=1.0, shift=1e6)
    for number, model in enumerate(("bm25", backbone, dead)):
        found = evaluate(model, collection, TIED, depth=1000, output=tmp_path / str(number))
        values = [value for of in found.per_query.values() for value in of.values()]
        assert len(values) == 4 * len(TIED)
        for path in (tmp_path / str(number)).glob("*.json"):
            json.loads(path.read_text(), parse_constant=pytest.fail)
    assert found.document_active_dims == found.query_active_dims == found.flops == 0
    assert set(found.metrics.values()) == {0.0}
    assert not found.run["found"]
    for point in curve(found, collection):
        assert point["flops"] == 0
    with pytest.raises(OptionError, match="`depth` is 0"):
        evaluate("bm25", collection, depth=0)
    with pytest.raises(DataError, match="nobody: needs at least one document, one query and one judgement"):
        evaluate("bm25", Collection("nobody", corpus, {}, {}))


def test_the_record_says_what_was_done(backbone, collection_folder, tmp_path):
    first = evaluate(backbone, collection_folder, ["RR@10"], cache=tmp_path / "cache")
    assert first.cost["texts_per_second"] > 0
    again = evaluate(backbone, collection_folder, ["RR@10"], cache=tmp_path / "cache")
    assert again.cost["texts_per_second"] is None  # its vectors were read, not encoded
    assert first.precision == again.precision == "float32"
    half = SparseEncoder(backbone).bfloat16()
    half.model_card_data.base_model = "the-backbone"
    found = evaluate(half, collection_folder, ["RR@10"])
    assert found.precision == "bfloat16"  # the weights are, whatever was asked for
    assert found.model == "a loaded SparseEncoder, base model the-backbone"


def test_costs_by_hand(backbone, collection_folder):
    result = evaluate(backbone, collection_folder)
    queries, documents = (matrix.toarray() > 0 for matrix in result.vectors)
    costs = result.cost
    assert costs["document_active_dims"]["median"] == np.median(documents.sum(1))
    assert costs["query_active_dims"]["p95"] == pytest.approx(np.quantile(queries.sum(1), 0.95))
    assert costs["vocabulary_used"] == documents.any(0).sum()
    assert costs["postings_per_query"] == pytest.approx(np.mean([documents[:, query].sum() for query in queries]))
    assert result.flops == pytest.approx(costs["postings_per_query"] / len(documents))


def test_costs_of_a_few_numbers():
    queries = sparse.csr_matrix(np.array([[3, 5, 0, 0], [0, 2, 0, 0]], np.float32))  # terms are in 1, 2, 0 and 0 queries
    documents = sparse.csr_matrix(np.array([[1, 0, 4, 0], [2, 2, 2, 0], [0, 0, 7, 0]], np.float32))  # in 2, 1, 3 and 0 documents
    assert search_cost(queries, documents) == {
        "query_active_dims": {"mean": 1.5, "median": 1.5, "p95": pytest.approx(1.95)},  # between 1 and 2
        "document_active_dims": {"mean": 2, "median": 2, "p95": pytest.approx(2.9)},  # between 1, 2 and 3
        "flops": pytest.approx((1 * 2 + 2 * 1) / (2 * 3)),
        "vocabulary_used": 3,
        "postings_per_query": 4 / 2,
        "index_bytes": 8 * 6 + 8 * 5,  # six ids with their weights, and where each of four terms begins and ends
    }


def test_vectors_are_kept_by_content(backbone, collection_folder, tmp_path, monkeypatch):
    first = evaluate(backbone, collection_folder, cache=tmp_path / "cache")
    monkeypatch.setattr("anysplade.model.encoding._vectors", None)  # nothing may be encoded
    again = evaluate(backbone, collection_folder, cache=tmp_path / "cache")
    assert again.metrics == first.metrics
    assert again.run == first.run
    monkeypatch.undo()
    changed = tmp_path / "changed"
    shutil.copytree(backbone, changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 0.5}))
    assert evaluate(changed, collection_folder, cache=tmp_path / "cache").run != first.run


def _evaluate(*arguments, cache):
    import anysplade.model.encoding

    anysplade.model.encoding._SHARD = 4
    vectors = anysplade.model.encoding._vectors
    anysplade.model.encoding._vectors = lambda *given: (time.sleep(0.1), vectors(*given))[1]
    evaluate(*arguments, cache=cache, runtime="torch")


def test_killed_and_started_again(backbone, collection_folder, tmp_path, monkeypatch):
    whole = evaluate(backbone, collection_folder)
    process = preloaded_context().Process(
        target=_evaluate, args=(backbone, str(collection_folder)), kwargs={"cache": tmp_path / "cache"}
    )
    process.start()
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "cache").rglob("0*.npz"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.join()
    kept = len(list((tmp_path / "cache").rglob("0*.npz")))
    assert 3 <= kept < 10
    encoded = []
    vectors = encoding._vectors

    def counted(encoder, features, role):
        encoded.extend(["text"] * len(features["input_ids"]) if role == "document" else [])
        return vectors(encoder, features, role)

    monkeypatch.setattr(encoding, "_vectors", counted)
    monkeypatch.setattr("anysplade.model.encoding._SHARD", 4)
    again = evaluate(backbone, collection_folder, cache=tmp_path / "cache")
    assert len(encoded) == 40 - 4 * kept  # what was whole is not encoded again
    timings = ("seconds", "provenance", "cost")
    assert {k: v for k, v in again.to_dict().items() if k not in timings} == {
        k: v for k, v in whole.to_dict().items() if k not in timings
    }


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.integers(0, 19), st.integers(1, 5), max_size=12), min_size=1, max_size=6), k=st.integers(1, 8)
)
def test_pruning_keeps_the_largest(rows, k):
    dense = np.zeros((len(rows), 20), np.float32)
    for i, row in enumerate(rows):
        for term, weight in row.items():
            dense[i, term] = weight
    pruned = prune(sparse.csr_matrix(dense), k)
    assert pruned.has_sorted_indices
    for i, row in enumerate(dense):
        order = sorted(np.flatnonzero(row), key=lambda term: (-row[term], term))[:k]
        expected = np.zeros(20)
        expected[order] = row[order]
        assert (pruned[i].toarray()[0] == expected).all()


def test_a_dense_model_is_evaluated_by_exact_nearest_neighbours(teachers, collection_folder, tmp_path):
    collection = load_collection(collection_folder)
    found = evaluate(teachers["dense"], collection, ["nDCG@10", "R@100"], cache=tmp_path, output=tmp_path / "out")
    model = SentenceTransformer(teachers["dense"])
    texts = [document.full_text for document in collection.corpus.values()]
    scores = model.similarity(model.encode_query(list(collection.queries.values())), model.encode_document(texts)).numpy()
    ids = list(collection.corpus)
    for query_id, row in zip(collection.queries, scores, strict=True):
        ranking = found.run[query_id]
        assert len(ranking) == len(ids)  # negative cosines too
        np.testing.assert_allclose([ranking[id_] for id_ in ids], row, atol=1e-6)
        assert list(ranking.values()) == sorted(ranking.values(), reverse=True)
    assert (found.kind, found.query_active_dims, found.document_active_dims, found.flops) == ("dense", 32, 32, 32)
    assert found.cost["index_bytes"] == 4 * 32 * len(ids)
    assert found.cost["texts_per_second"] > 0
    assert found.vectors is None
    again = evaluate(teachers["dense"], collection, ["nDCG@10"], cache=tmp_path)
    assert again.cost["texts_per_second"] is None  # nothing was encoded
    assert again.run == found.run
    loaded = evaluate(model, collection, ["nDCG@10"])
    assert loaded.metrics["nDCG@10"] == found.metrics["nDCG@10"]
    assert "a loaded SentenceTransformer" in loaded.model
    with pytest.raises(OptionError, match="a dense model is evaluated on torch"):
        evaluate(teachers["dense"], collection, precision="int8")


def test_a_dense_model_beside_others(teachers, collection_folder):
    found = evaluate_all([teachers["dense"], "bm25"], collection_folder, "nDCG@10", curves=True)
    assert [one.kind for one in found.evaluations] == ["dense", "bm25"]
    assert len(found.comparisons) == 1
    assert found.curves == []
    text = "\n".join(map(str, evaluations_parts(found, ["nDCG@10"])))
    assert "is dense: exact nearest neighbours" in text


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_what_is_cut_is_counted_and_vectors_are_kept_by_what_is_read(kind, teachers, collection_folder, tmp_path, caplog):
    caplog.set_level("INFO", "anysplade")
    model, own = teachers[kind], open_dense(teachers["dense"]).max_seq_length
    whole, same, short = (evaluate(model, collection_folder, "nDCG@10", max_length=n, cache=tmp_path) for n in (None, own, 8))
    assert whole.cut == same.cut == {role: {"count": 0, "max_length": own} for role in ("document", "query")}
    assert short.cut["document"] == {"count": 40, "max_length": 8}
    assert [one.cost["texts_per_second"] is None for one in (whole, same, short)] == [False, True, False]
    assert same.run == whole.run != short.run
    where = f"{model} on {whole.collection}: 40 of 40 documents were cut at 8 tokens"
    assert [f"{where}, and what follows cannot be found; `max_length` raises the limit, up to {own}"] == caplog.messages


def test_own_words(backbone, collection_folder, tmp_path):
    """A model whose terms are the words of the text keeps them all; what the cache has is counted again."""
    found = evaluate_all([make_lexical(tmp_path / "model"), backbone, "bm25"], collection_folder, cache=tmp_path / "cache")
    lexical, random, bm25 = found.evaluations
    assert (lexical.query_own_words, lexical.document_own_words) == (1, 1)
    assert 0 < random.document_own_words < 1
    assert bm25.document_own_words is None
    assert "own words" in [column.header for column in evaluations_parts(found, ["nDCG@10"])[0].columns]
    again = evaluate(backbone, collection_folder, cache=tmp_path / "cache").to_dict()
    assert again["document_own_words"] == random.document_own_words


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_a_long_document_is_ranked_by_its_best_passage(kind, teachers, collection_folder, caplog):
    loaded = load_collection(collection_folder)
    words = [word for document in loaded.corpus.values() for word in document.text.split()]
    corpus = {f"d{i}": Document("", " ".join(words[i : i + 10 * i + 1])) for i in range(12)}
    ends = {f"q{i}": document.text.split()[-1] for i, document in enumerate(corpus.values())}
    collection = Collection("long", corpus, ends, {f"q{i}": {f"d{i}": 1} for i in range(12)})
    caplog.set_level("INFO")
    found = evaluate(teachers[kind], collection, "nDCG@10", passages="16:8")
    assert found.cut["document"]["count"] == 0
    assert found.passages == found.to_dict()["passages"] == "16:8"
    pieces = {f"{id_} {start}": d.text.split()[start : start + 16] for id_, d in corpus.items() for start in range(0, 121, 8)}
    pieces = {id_: words for id_, words in pieces.items() if id_.endswith(" 0") or len(words) > 8}
    split = Collection("split", {id_: Document("", " ".join(words)) for id_, words in pieces.items()}, ends, collection.qrels)
    whole = evaluate(teachers[kind], split, "nDCG@10")
    for query_id, ranking in whole.run.items():
        best = {}
        for id_, score in ranking.items():
            best.setdefault(id_.split()[0], score)
        assert found.run[query_id] == pytest.approx(best, rel=1e-4, abs=1e-5)
    assert found.cost["passages"] == len(pieces)
    assert found.cost["passages_per_document"] == len(pieces) / 12
    assert found.cost["flops_per_passage"] == pytest.approx(whole.flops)
    assert found.flops == pytest.approx(whole.flops * len(pieces) / 12)
    assert found.document_active_dims == pytest.approx(whole.document_active_dims)
    if kind == "sparse":
        assert evaluate(teachers[kind], collection, "nDCG@10").metrics["nDCG@10"] < found.metrics["nDCG@10"]
        assert curve(found, collection)[0]["nDCG@10"] == found.metrics["nDCG@10"]


def test_short_documents_in_passages_are_as_they_were(teachers, collection_folder):
    models = [teachers["sparse"], "bm25"]
    whole, split = (evaluate_all(models, collection_folder, "nDCG@10", passages=window) for window in (None, "62"))
    assert [one.run for one in split.evaluations] == [one.run for one in whole.evaluations]
    assert [one.passages for one in split.evaluations] == ["62", None]
    assert split.evaluations[0].flops == pytest.approx(whole.evaluations[0].flops)
    shown = [str(part) for part in evaluations_parts(split, ["nDCG@10"])]
    assert any("best of the passages of 62 tokens, 1.00 per document; FLOPS count all" in line for line in shown)
    for comparison in split.comparisons:
        assert comparison.changed == whole.comparisons[0].changed
    with pytest.raises(OptionError, match="whole documents"):
        evaluate_all(models, collection_folder, "nDCG@10", passages="62", lexical=3)
