import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from anysplade import (
    Collection,
    DataError,
    Document,
    ModelError,
    OptionError,
    OutputError,
    compare,
    evaluate,
    evaluate_all,
    load_collection,
)
from anysplade.cli import main
from anysplade.evaluation.comparisons import _main_terms
from anysplade.evaluation.runs import write_run
from anysplade.evaluation.significance import holm
from tiny import make_collection


def test_a_comparison_by_hand(pair):
    collection, evaluations = pair
    found = {c.metric: c for c in compare(evaluations, {collection.name: collection})}
    before, after = ([e.per_query["nDCG@10"][q] for q in collection.queries] for e in evaluations)
    one = found["nDCG@10"]
    assert one.difference == pytest.approx(np.mean(after) - np.mean(before))
    assert one.p == pytest.approx(stats.ttest_rel(after, before).pvalue)
    assert one.wins + one.ties + one.losses == len(collection.queries)
    assert one.losses == sum(a < b for a, b in zip(after, before, strict=True))
    assert one.interval[0] < one.difference < one.interval[1] < 0
    assert (one.p_corrected, found["RR@10"].p_corrected) == (one.p, None)  # the primary metric alone, and that is one comparison
    changes = [abs(change["after"] - change["before"]) for change in one.changed]
    assert changes == sorted(changes, reverse=True)
    first = one.changed[0]
    assert first["query"] == collection.queries[first["query_id"]]
    assert first["document_id"] in collection.qrels[first["query_id"]]
    # The terms of the sparse model sum up to less than the score of that document, or to all of it.
    assert sum(first["terms_after"].values()) > 0
    assert "terms_before" not in first  # BM25 has no vectors


def test_wins_ties_and_losses_by_hand(pair):
    collection, (bm25, _) = pair
    values = dict(zip(collection.queries, [(0.5, 1.0), (0.5, 0.5), (0.5, 0.5 + 1e-12), (1.0, 0.25), (0.0, 0.5)], strict=False))
    before, after = (
        replace(bm25, model=name, metrics={"RR@10": 0.0}, per_query={"RR@10": {q: both[i] for q, both in values.items()}})
        for i, name in enumerate(("a", "b"))
    )
    (found,) = compare([before, after])
    assert (found.model, found.baseline) == ("b", "a")
    assert (found.wins, found.ties, found.losses) == (2, 2, 1)
    assert found.difference == pytest.approx((0.5 - 0.75 + 0.5) / 5)
    largest_first = [list(values)[i] for i in (3, 0, 4)]  # equal changes in the order of the queries
    assert [changed["query_id"] for changed in found.changed] == largest_first
    assert [(changed["before"], changed["after"]) for changed in found.changed] == [values[id_] for id_ in largest_first]


def test_terms_by_their_part_of_the_score(pair):
    collection, (_, evaluation) = pair
    query_id, document_id = list(collection.queries)[3], list(collection.corpus)[5]
    parts = evaluation.vectors[0][3].toarray()[0] * evaluation.vectors[1][5].toarray()[0]
    largest = np.sort(parts)[::-1][:5]
    found = _main_terms(evaluation, collection, query_id, document_id)
    assert list(found.values()) == pytest.approx(largest, abs=6e-4)  # rounded to a thousandth
    assert [parts[evaluation.terms.index(term)] for term in found] == pytest.approx(largest)


@pytest.mark.parametrize("metrics", [["nDCG@10", "RR@10", "R@100"], ["RR@10", "nDCG@10"], ["P@1"]])
def test_the_first_metric_is_corrected_over_models_and_collections(metrics, collection_folder, tmp_path):
    """Three models on two collections: four comparisons a metric, of which those of the first are corrected together."""
    other = make_collection(tmp_path / "other", documents=12)
    random.seed(0)
    collections = [load_collection(folder) for folder in (collection_folder, other)]
    for name in ("a", "b"):
        runs = [{q: {d: random.random() for d in c.corpus} for q in c.queries} for c in collections]
        ranked = {q: dict(sorted(run[q].items(), key=lambda item: -item[1])) for run in runs for q in run}
        write_run(tmp_path / f"{name}.trec", ranked, name)
    runs = [str(tmp_path / f"{name}.trec") for name in ("a", "b")]
    found = evaluate_all(["bm25", *runs], [collection_folder, other], metrics).comparisons
    primary = [c for c in found if c.metric == metrics[0]]
    assert len(primary) == 4
    assert [c.p_corrected for c in primary] == holm([c.p for c in primary])
    assert [c.is_shown for c in primary] == [c.p_corrected < 0.05 for c in primary]
    assert {(c.p_corrected, c.is_shown) for c in found if c.metric != metrics[0]} == ({(None, False)} if metrics[1:] else set())


def test_nothing_to_tell_apart(pair):
    _, (bm25, _) = pair
    (first, *_) = compare([bm25, bm25.__class__(**vars(bm25) | {"model": "again"})])
    assert (first.difference, first.p, first.p_corrected, first.interval) == (0, 1, 1, (0, 0))
    assert first.ties == bm25.queries
    assert first.changed == []


def test_different_queries_cannot_be_compared(pair):
    _, (bm25, other) = pair
    fewer = {metric: dict(list(values.items())[1:]) for metric, values in other.per_query.items()}
    with pytest.raises(DataError, match="different queries"):
        compare([bm25, other.__class__(**vars(other) | {"per_query": fewer})])


def test_evaluations_are_compared_in_a_list(pair):
    first, second = pair[1]
    with pytest.raises(OptionError, match=r"`evaluations` is a Evaluation; give a list: \[first, second\]"):
        compare(first, second)
    with pytest.raises(OptionError, match="`evaluations` is a str; give a list of what evaluate returned"):
        compare(["a.trec", "b.trec"])


def test_an_impossible_folder_is_told_before_the_work(collection_folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file/out: cannot be written"):
        evaluate("no/such-model", collection_folder, output=tmp_path / "file" / "out")
    with pytest.raises(ModelError):
        evaluate("./nowhere", collection_folder, output=tmp_path / "new" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def namesakes(collection_folder, tmp_path):
    """a/docs and b/docs with the same ids of queries, b's judgements moved by one."""
    for name in ("a", "b"):
        shutil.copytree(collection_folder, tmp_path / name / "docs")
    qrels = tmp_path / "b" / "docs" / "qrels" / "test.tsv"
    head, *rows = qrels.read_text().splitlines()
    moved = [f"q{i}\td{(i + 1) % len(rows)}\t1" for i in range(len(rows))]
    qrels.write_text("\n".join([head, *moved, ""]))
    return [str(tmp_path / name / "docs") for name in ("a", "b")]


def test_evaluations_of_namesakes_are_not_compared(namesakes):
    one, other = (evaluate("bm25", name, ["nDCG@10"]) for name in namesakes)
    with pytest.raises(DataError, match="different collections that are both called docs"):
        compare([one, other])
    with pytest.raises(OptionError, match="no two are of the same collection"):
        compare([one, replace(other, collection="other")])


def test_one_query_tells_nothing(collection_folder):
    collection = load_collection(collection_folder)
    one = replace(collection, queries={"q0": "nothing known"}, qrels={"q0": {"d0": 1}})
    base = evaluate("bm25", one, ["nDCG@10"])
    better = replace(base, model="better", per_query={"nDCG@10": {"q0": 1.0}})
    (found,) = compare([base, better])
    assert (found.difference, found.p, found.p_corrected) == (1.0, 1.0, 1.0)


def test_the_changed_queries_name_the_models_and_cannot_be_misread(backbone, tmp_path, capsys):
    """Every model against the first one; a document's id that is a number does not look like a count."""
    folder = tmp_path / "numbers"
    (folder / "qrels").mkdir(parents=True)
    words = ("kabel", "lodan", "mifil")
    rows = [{"_id": f"121511{i}", "text": word} for i, word in enumerate(words)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"_id": f"q{i}", "text": word} for i, word in enumerate(words)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\t121511{i}\t1\n" for i in range(3)))
    (tmp_path / "bad.run").write_text("q0 Q0 1215111 1 2 x\nq0 Q0 1215110 2 1 x\nq1 Q0 1215111 1 1 x\n")
    (tmp_path / "worse.run").write_text("q0 Q0 1215111 1 2 x\n")
    names = ["bm25", str(tmp_path / "bad.run"), str(tmp_path / "worse.run")]
    assert main(["evaluate", *names, str(folder), "--metrics", "RR@10"]) == 0
    shown = capsys.readouterr().out
    assert " of 121511" not in shown
    for name in names[1:]:
        assert f"changed most in RR@10, from bm25 to {name}:" in shown
    assert "\n    bm25: document 1215110 at rank 1\n" in shown
    assert f"\n    {names[1]}: document 1215110 at rank 2\n" in shown
    assert f"\n    {names[2]}: document 1215110 not found\n" in shown


@pytest.fixture
def two_queries(collection_folder, tmp_path):
    """A folder of two queries, and run files that find one document each: "good" at rank 1, "late" at rank 2."""
    (tmp_path / "good.trec").write_text("q0 Q0 d0 1 2 x\nq1 Q0 d1 1 2 x\n")
    (tmp_path / "late.trec").write_text("".join(f"q{i} Q0 d9 1 2 x\nq{i} Q0 d{i} 2 1 x\n" for i in range(2)))
    qrels = collection_folder / "qrels" / "test.tsv"
    folder = shutil.copytree(collection_folder, tmp_path / "two")
    (folder / "qrels" / "test.tsv").write_text("\n".join(qrels.read_text().splitlines()[:3]) + "\n")
    return folder, [str(tmp_path / f"{name}.trec") for name in ("late", "good")]


def test_a_constant_difference_is_shown_without_an_interval(two_queries, capsys, monkeypatch):
    folder, runs = two_queries
    monkeypatch.chdir(folder.parent)
    assert main(["compare", *(Path(run).name for run in runs), "--collection", "two", "--metrics", "RR@10"]) == 0
    assert "RR@10 +0.500 – 0.5 0.5 2 / 0 / 0" in " ".join(capsys.readouterr().out.split())


def test_two_names_of_a_measure_are_one_comparison(two_queries):
    folder, runs = two_queries
    once = evaluate_all(runs, folder, ["RR@10", "P@1"])
    twice = evaluate_all(runs, folder, ["RR@10", "MRR@10", "P@1", "Precision@1"])
    expected = {c.metric: (c.difference, c.p, c.p_corrected) for c in once.comparisons}
    found = {c.metric: (c.difference, c.p, c.p_corrected) for c in twice.comparisons}
    assert found == expected | {"MRR@10": expected["RR@10"], "Precision@1": expected["P@1"]}
    assert (expected["RR@10"], expected["P@1"][2]) == ((0.5, 0.5, 0.5), None)


def test_evaluations_that_name_a_measure_otherwise_are_compared(two_queries):
    folder, runs = two_queries
    collection = load_collection(folder)
    late, good = (evaluate(run, collection, [name]) for run, name in zip(runs, ("MRR@10", "RR@10"), strict=True))
    (found,) = compare([late, good])
    assert (found.metric, found.difference) == ("RR@10", 0.5)
    with pytest.raises(DataError, match=r"late.trec: evaluated without P@1; give it the `metrics` of"):
        compare([late, evaluate(runs[1], collection, ["P@1"])])


def ranking(query, *documents):
    return "".join(f"{query} Q0 {document} {rank} {-rank} x\n" for rank, document in enumerate(documents, 1))


FILLERS = [f"d{i}" for i in range(10, 40)]


@pytest.mark.parametrize(
    "metric, grades, before, after, document, ranks",
    [
        # The one of the highest grade falls from 22 to 30, below the cutoff; the gain is the other's.
        ("nDCG@10", {"d0": 2, "d1": 1}, [*FILLERS[:10], "d1", *FILLERS[10:20], "d0"], ["d1", *FILLERS[:28], "d0"], "d1", (11, 1)),
        ("RR@10", {"d0": 1, "d1": 1}, ["d2", "d0", "d1"], ["d1", "d2", "d0"], "d1", (3, 1)),
        ("RR@10", {"d0": 1, "d1": 1}, ["d0", "d2", "d1"], ["d2", "d1", "d0"], "d0", (1, 3)),  # a loss
        ("R@5", {"d0": 1, "d1": 1}, ["d2", "d3", "d0", *FILLERS[:2], "d1"], ["d0", "d2", "d3", FILLERS[0], "d1"], "d1", (6, 5)),
        ("AP", {"d0": 1, "d1": 1}, [*FILLERS[:20], "d0", "d1"], ["d1", *FILLERS[:20], "d0"], "d1", (22, 1)),
        ("P@2", {"d0": 1, "d1": 1, "d2": 0}, ["d0", "d1"], ["d0", "d2", "d1"], "d1", (2, 3)),
        ("nDCG@10", {"d0": 1, "d1": 1}, ["d2"], ["d2", "d3", "d1", "d4", "d0"], "d1", (None, 3)),
        ("nDCG@10", {"d0": 1, "d1": 3}, ["d0", "d1"], ["d0"], "d1", (2, None)),
        ("nDCG(dcg='exp-log2')@5", {"d0": 1, "d1": 3}, ["d2", "d3", "d1", "d0"], ["d0", "d1", "d3"], "d1", (3, 2)),
    ],
)
def test_the_document_that_made_the_change_is_shown(metric, grades, before, after, document, ranks, collection_folder, tmp_path):
    collection = replace(load_collection(collection_folder), queries={"q0": "a"}, qrels={"q0": grades})
    evaluations = []
    for name, documents in (("before", before), ("after", after)):
        (tmp_path / f"{name}.trec").write_text(ranking("q0", *documents))
        evaluations.append(evaluate(tmp_path / f"{name}.trec", collection, [metric]))
    (change,) = compare(evaluations, {collection.name: collection})[0].changed
    assert (change["document_id"], change["rank_before"], change["rank_after"]) == (document, *ranks)
    assert change["document"] == collection.corpus[document].full_text


def test_runs_without_a_query_in_common(collection_folder, tmp_path, capsys, caplog):
    names = [str(tmp_path / f"{name}.trec") for name in "ab"]
    for name, queries in zip(names, (range(10), range(10, 20)), strict=True):
        Path(name).write_text("".join(f"q{i} Q0 d{i} 1 1 x\n" for i in queries))
    assert main(["compare", *names, "--collection", str(collection_folder)]) == 2
    assert f"{names[1]} and {names[0]}: none of the 20 queries are in both runs (" in capsys.readouterr().err
    Path(names[1]).write_text("".join(f"q{i} Q0 d{i} 1 1 x\n" for i in range(9, 20)))
    assert main(["compare", *names, "--collection", str(collection_folder)]) == 0
    assert "only 1 of 20 queries are in both runs (5 %; " in caplog.text


def test_the_pieces_of_a_word_are_shown_as_the_word(tmp_path, capsys):
    corpus = {"d0": Document("", "laminarization of pipes"), "d1": Document("", "arrays")}
    collection = Collection("words", corpus, {"q": "laminarization"}, {"q": {"d0": 1}})
    found = evaluate("bert-tiny", collection, "RR@10")
    pieces = [term for term, word in found.words["q"].items() if word == "laminarization"]
    assert len(pieces) > 1
    shown = _main_terms(found, collection, "q", "d0")
    assert "laminarization" in shown
    assert not shown.keys() & set(pieces)
    assert "words" not in found.to_dict()
