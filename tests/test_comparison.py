import json

import numpy as np
import pytest
from scipy import stats

from anysplade import DataError, OptionError, compare, evaluate, evaluate_all, load_collection
from anysplade.comparison import holm, interval
from anysplade.evaluation import write_run


@pytest.fixture
def pair(backbone, collection_folder):
    collection = load_collection(collection_folder)
    return collection, [evaluate(model, collection, ["nDCG@10", "RR@10"]) for model in ("bm25", backbone)]


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
    assert sorted(c.p_corrected for c in found.values()) == sorted(holm([c.p for c in found.values()]))
    changes = [abs(change["after"] - change["before"]) for change in one.changed]
    assert changes == sorted(changes, reverse=True)
    first = one.changed[0]
    assert first["query"] == collection.queries[first["query_id"]]
    assert first["document_id"] in collection.qrels[first["query_id"]]
    # The terms of the sparse model sum up to less than the score of that document, or to all of it.
    assert sum(first["terms_after"].values()) > 0
    assert "terms_before" not in first  # BM25 has no vectors


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


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_intervals_cover():
    """The mean of a skewed sample lies in its 95 % interval about as often as it says."""
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        low, high = interval(generator.exponential(1.0, 100))
        covered += low <= 1 <= high
    assert 85 <= covered <= 100


def test_everything_at_once(backbone, collection_folder, tmp_path):
    found = evaluate_all(
        ["bm25", backbone, backbone, str(collection_folder)], ["nDCG@10"], seeds=True, curves=True, output=tmp_path / "out"
    )
    assert [e.model for e in found.evaluations] == ["bm25", backbone, backbone]
    (mean,) = found.means
    assert mean["nDCG@10"] == pytest.approx(found.evaluations[1].metrics["nDCG@10"])
    assert mean["nDCG@10 sd"] == 0
    assert len(found.comparisons) == 2
    points = found.curves[0]["points"]
    assert points[0]["nDCG@10"] == found.evaluations[1].metrics["nDCG@10"]
    flops = [point["flops"] for point in points if point["document_top_k"] is not None]
    assert flops == sorted(flops)
    assert all(point["document_active_dims"] <= point["document_top_k"] for point in points if point["document_top_k"] is not None)
    written = json.loads((tmp_path / "out" / "evaluations.json").read_text())
    assert written == json.loads(json.dumps(found.to_dict()))
    assert sorted(p.parent.name.split("-")[0] for p in (tmp_path / "out").rglob("run.trec")) == ["1", "2", "3"]


def test_a_run_file_stands_in_the_table(collection_folder, tmp_path):
    collection = load_collection(collection_folder)
    bm25 = evaluate("bm25", collection)
    write_run(tmp_path / "a.trec", bm25.run)
    found = evaluate_all(["bm25", str(tmp_path / "a.trec"), str(collection_folder)])
    assert found.evaluations[0].metrics == found.evaluations[1].metrics
    assert all(comparison.difference == 0 for comparison in found.comparisons)


def test_names_without_a_model(collection_folder):
    with pytest.raises(OptionError, match="at least one model and then a collection"):
        evaluate_all([str(collection_folder)])
    with pytest.raises(OptionError, match="nothing: name"):
        evaluate_all([])
