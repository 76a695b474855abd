import pytest

from anysplade.cells import COSTS, METRICS
from anysplade.conclusions import summarize

QUERIES = [f"q{i}" for i in range(40)]


def record(value, seed, flops=1.0, k=1.0, start=1.0, wobble=0.02):
    per_query = {id_: value + wobble * ((i + seed) % 3 - 1) for i, id_ in enumerate(QUERIES)}
    found = dict.fromkeys((*METRICS, *COSTS), value) | {"flops": flops, "per_query": per_query}
    seen = [
        {
            "step": s,
            "loss": 2.0 / (s + 1),
            "score_std": 1.0,
            "document_similarity": 0.5,
            "query_active_dims": 3.0,
            "document_active_dims": 9.0,
        }
        for s in (0, 1)
    ]
    known = ("mean_row_norm", "positive_share", "document_active_dims", "score_std", "document_similarity", "start_loss")
    return {
        "k": k,
        "shift": 0.0,
        "temperature": 1.0,
        "results": {"docs": found},
        "before": dict.fromkeys(known, start),
        "after": dict.fromkeys(known, start),
        "findings": [],
        "observations": seen,
        "log": [{"step": 1, "grad_norm": 2.0}],
    }


def made(name, table, backbone="bert"):
    """table: (arm, axis, value, flops) each."""
    records, rows = {}, []
    for i, (arm, axis, value, flops) in enumerate(table):
        hashes = [f"{i}-{seed}" for seed in (0, 1)]
        records |= {hash_: record(value + 0.01 * seed, seed, flops, start=i + 1) for seed, hash_ in enumerate(hashes)}
        rows.append({"backbone": backbone, "arm": arm, "axis": axis, "cells": hashes})
    return summarize(name, rows, records, ["docs"], 8.0)


def test_means_and_deviations():
    row = made("norm", [("raw", {}, 0.3, 2.0)])["rows"][0]
    assert row["results"]["docs"]["nDCG@10"] == pytest.approx(0.305)
    assert row["results"]["docs"]["nDCG@10 sd"] == pytest.approx(0.01 / 2**0.5)
    assert row["runs"] == 2


def test_main_says_collapse_and_both_directions():
    better = made("main", [("raw", {}, 0.05, 9.0), ("k=4", {}, 0.3, 4.0), ("k=8", {}, 0.4, 4.0), ("auto", {}, 0.5, 1.0)])
    assert "the raw head collapses, at 11%" in better["conclusions"][0]
    assert "auto is better than the best fixed k (k=8)" in better["conclusions"][1]
    assert "0.25 times its FLOPS." in better["conclusions"][1]
    worse = made("main", [("raw", {}, 0.5, 9.0), ("k=8", {}, 0.5, 1.0), ("auto", {}, 0.3, 4.0)])
    assert "trains as well as the best" in worse["conclusions"][0]
    assert "auto is worse than the best fixed k" in worse["conclusions"][1]
    assert "4 times its FLOPS: a higher cost." in worse["conclusions"][1]
    even = made("main", [("raw", {}, 0.4, 9.0), ("k=8", {}, 0.4, 1.0), ("auto", {}, 0.4, 1.0)])
    assert "no difference shows" in even["conclusions"][1]
    assert {test["against"] for test in even["tests"]} == {"raw", "k=8"}


def test_controls_say_what_follows():
    table = [
        ("raw", {}, 0.1, 9.0),
        ("k=8", {}, 0.4, 4.0),
        ("runtime scalar 1/8", {}, 0.1, 4.0),
        ("shift alone", {}, 0.5, 1.0),
        ("untied, not scaled", {}, 0.05, 9.0),
    ]
    said = {pair["about"]: pair["said"] for pair in made("controls", table)["pairs"]}
    assert said["scale, with the step size that Adam gives it"].endswith("dividing W and b by k helps as the paper has it.")
    assert said["scale of the scores alone"].endswith("smaller scores alone do not help.")
    assert "Adam's k times larger relative steps" in said["relative step size, given the scale"]
    assert said["untying alone"].endswith("untying by itself does not help, rather the reverse.")
    assert said["level against scale"].endswith("the level does more than the paper's scale.")
    assert "temperature" not in said


def test_a_difference_within_the_noise_of_the_seeds_is_none():
    rows = [{"backbone": "bert", "arm": arm, "axis": {}, "cells": [f"{arm}-0", f"{arm}-1"]} for arm in ("raw", "k=8", "auto")]
    values = {"raw": (0.05, 0.05), "k=8": (0.2, 0.4), "auto": (0.35, 0.36)}
    records = {f"{arm}-{seed}": record(value, seed) for arm, of in values.items() for seed, value in enumerate(of)}
    main = summarize("main", rows, records, ["docs"], 8.0)
    against = {test["against"]: test for test in main["tests"]}
    assert against["k=8"]["p_corrected"] < 1e-6  # over queries, whose values hardly differ
    assert "no difference shows between auto and the best fixed k" in main["conclusions"][1]
    said = {pair["about"]: pair["said"] for pair in summarize("controls", rows, records, ["docs"], 8.0)["pairs"]}
    assert said["scale, with the step size that Adam gives it"].endswith("dividing W and b by k helps as the paper has it.")


def test_norm_needs_three_heads_for_a_correlation():
    few = made("norm", [("raw", {}, 0.1, 1.0), ("auto", {}, 0.2, 1.0)])
    assert few["correlations"] == {}
    rising = made("norm", [("raw", {}, 0.1, 1.0), ("k=8", {}, 0.2, 1.0), ("auto", {}, 0.3, 1.0)])
    assert rising["correlations"]["heads, raw and calibrated"]["mean_row_norm"] == pytest.approx(1.0)


def test_tradeoff_and_sensitivity():
    points = [("raw", {"weight": 1}, 0.3, 10.0), ("auto", {"weight": 1}, 0.4, 2.0), ("auto", {"weight": 2}, 0.35, 1.0)]
    assert "is reached by auto with 0.355 ± 0.007 at 1.00, 10 times fewer" in made("tradeoff", points)["conclusions"][0]
    points = [("raw", {"weight": 1}, 0.5, 10.0), ("auto", {"weight": 1}, 0.4, 2.0)]
    assert "is not reached by auto, whose best is 0.405" in made("tradeoff", points)["conclusions"][0]
    line = [(f"k={k}", {"k": float(k)}, value, 5.0) for k, value in ((1, 0.1), (4, 0.4), (8, 0.39), (16, 0.2))]
    grid = [("k=1, level", {"k": 1.0, "level": 0.01}, 0.6, 1.0)]
    said = made("sensitivity", [*line, *grid, ("auto", {}, 0.5, 1.0)])["conclusions"][0]
    assert "of k alone 4 is best" in said
    assert "k from 4 to 8 stays within 5%" in said
    assert "auto has 0.505 ± 0.007, 0.83 of the map's best" in said


def test_dynamics_keeps_every_seed():
    found = made("dynamics", [("raw", {}, 0.1, 1.0)])
    assert found["curves"][0]["curves"]["loss"] == [[[0, 2.0], [1, 1.0]]] * 2
    assert "ranking loss 2 at first, 1 at last" in found["conclusions"][0]
