import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from anysplade import (
    OptionError,
    evaluate,
    evaluate_all,
    load_collection,
    load_encoder,
)
from anysplade.cli import main
from anysplade.evaluation.grid import _over_collections, _over_seeds, distinct_names
from anysplade.evaluation.runs import write_run


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


def test_means_by_hand(pair):
    """Of 0.2, 0.4 and 0.9 the mean is 0.5, and the standard deviation of a sample √((0.09 + 0.01 + 0.16) / 2)."""
    _, (bm25, evaluation) = pair
    seeds = [replace(evaluation, metrics={"RR@10": value}, flops=10 * value) for value in (0.2, 0.4, 0.9)]
    (row,) = _over_seeds([bm25, *seeds])
    assert row["model"] == "mean of 3"
    assert (row["RR@10"], row["RR@10 sd"]) == (pytest.approx(0.5), pytest.approx(0.13**0.5))
    assert (row["flops"], row["flops sd"]) == (pytest.approx(5), pytest.approx(13**0.5))
    assert _over_seeds([bm25, seeds[0]]) == []
    mean = _over_collections(seeds)
    assert (mean["RR@10"], mean["flops"], mean["query_active_dims"]) == pytest.approx((0.5, 5, evaluation.query_active_dims))
    assert _over_collections([bm25, bm25])["flops"] is None


@pytest.mark.parametrize("models, collections, folders", [(1, 1, 0), (2, 1, 2), (1, 2, 2), (2, 2, 4)])
def test_one_evaluation_has_the_folder_to_itself(models, collections, folders, namesakes, tmp_path):
    evaluate_all(["bm25"] * models, namesakes[:collections], ["RR@10"], output=tmp_path / "out")
    assert (tmp_path / "out" / "run.trec").exists() == (tmp_path / "out" / "evaluation.json").exists() == (folders == 0)
    assert (tmp_path / "out" / "evaluations.json").exists() == (folders > 0)
    assert len(list((tmp_path / "out").glob("*/*/run.trec"))) == folders


def test_everything_at_once(backbone, collection_folder, tmp_path):
    found = evaluate_all(
        ["bm25", backbone, backbone], collection_folder, ["nDCG@10"], seeds=True, curves=True, output=tmp_path / "out"
    )
    assert [e.model for e in found.evaluations] == ["bm25", backbone, backbone]
    (mean,) = found.means
    assert mean["nDCG@10"] == pytest.approx(found.evaluations[1].metrics["nDCG@10"])
    assert mean["nDCG@10 sd"] == 0
    assert len(found.comparisons) == 2
    (over,) = found.seed_comparisons  # of seeds that do not differ, so only the queries do
    assert (over.seeds, over.baseline, over.difference) == (2, "bm25", pytest.approx(found.comparisons[0].difference))
    assert over.p == over.p_corrected == pytest.approx(found.comparisons[0].p)
    assert over.verdict == found.comparisons[0].verdict
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
    write_run(tmp_path / "a.trec", bm25.run, "bm25")
    found = evaluate_all(["bm25", tmp_path / "a.trec"], collection)
    assert found.evaluations[0].metrics == found.evaluations[1].metrics
    assert all(comparison.difference == 0 for comparison in found.comparisons)


@pytest.mark.parametrize("models, collections", [([], "python-docs"), ("bm25", []), ([], [])])
def test_no_model_or_no_collection(models, collections):
    with pytest.raises(OptionError, match="at least one model and one collection"):
        evaluate_all(models, collections)


def test_loaded_models_and_collections(backbone, collection_folder, tmp_path):
    encoder, collection = load_encoder(backbone, 1, 0), load_collection(collection_folder)
    found = evaluate_all(encoder, [collection, collection], "RR@10")
    assert [e.metrics for e in found.evaluations] == [evaluate(backbone, collection_folder, "RR@10").metrics]
    evaluate_all([encoder, "bm25"], collection, ["RR@10"], output=tmp_path / "out")
    assert {path.name for path in (tmp_path / "out" / "tiny").iterdir()} == {"1-SparseEncoder", "2-bm25"}


def test_collections_of_one_name_are_told_apart(backbone, namesakes, tmp_path, capsys):
    found = evaluate_all(["bm25", backbone], namesakes, ["nDCG@10"], output=tmp_path / "out")
    assert [e.collection for e in found.evaluations] == ["a/docs", "a/docs", "b/docs", "b/docs"]
    apart = [evaluate_all(["bm25", backbone], name, ["nDCG@10"]) for name in namesakes]
    assert [e.metrics for e in found.evaluations] == [e.metrics for one in apart for e in one.evaluations]
    assert [c.difference for c in found.comparisons] == [one.comparisons[0].difference for one in apart]
    assert [(c.collection, c.baseline, c.model) for c in found.comparisons] == [(n, "bm25", backbone) for n in ("a/docs", "b/docs")]
    written = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").rglob("evaluation.json"))]
    assert [one["nDCG@10"] for one in written] == [e.metrics["nDCG@10"] for e in found.evaluations]
    assert main(["evaluate", "bm25", backbone, *namesakes]) == 0
    assert "a/docs" in (shown := capsys.readouterr().out)
    assert "b/docs" in shown


def test_a_collection_named_twice_is_one(namesakes, tmp_path):
    (tmp_path / "link").symlink_to(namesakes[0])
    again = [namesakes[0], f"{namesakes[0]}/", str(tmp_path / "link"), str(Path(namesakes[0]) / ".." / "docs")]
    found = evaluate_all("bm25", again, ["nDCG@10"])
    assert [e.collection for e in found.evaluations] == ["docs"]


def test_a_model_named_twice_has_means_of_its_own(backbone, namesakes):
    found = evaluate_all(["bm25", "bm25"], namesakes, ["nDCG@10"])
    assert [row["collection"] for row in found.means] == ["mean of 2", "mean of 2"]


@pytest.mark.parametrize(
    "names, paths, expected",
    [
        (["docs", "docs"], ["/x/a/docs", "/x/b/docs"], ["a/docs", "b/docs"]),
        (["docs", "docs", "docs"], ["/x/a/docs", "/y/a/docs", "/y/b/docs"], ["x/a/docs", "y/a/docs", "b/docs"]),
        (["docs", "docs"], ["/x/docs", "/x/docs.zip"], ["docs", "docs.zip"]),
        (["a/docs", "docs", "docs"], [None, "/x/a/docs", "/x/b/docs"], ["a/docs", "x/a/docs", "b/docs"]),
        (["docs", "other"], ["/x/a/docs", "/x/b/other"], ["docs", "other"]),
    ],
)
def test_the_shortest_names_that_differ(names, paths, expected):
    assert distinct_names(names, [path and Path(path) for path in paths]) == expected


def test_output_folders_do_not_meet(namesakes, tmp_path):
    """a/docs and a-docs would be one folder."""
    third = tmp_path / "a-docs"
    shutil.copytree(namesakes[1], third)
    evaluate_all("bm25", [*namesakes, third], ["nDCG@10"], output=tmp_path / "out")
    found = [json.loads(path.read_text())["collection"] for path in (tmp_path / "out").rglob("evaluation.json")]
    assert sorted(found) == ["a-docs", "a/docs", "b/docs"]
