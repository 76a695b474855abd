import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest
from scipy import stats

from anysplade.study.aggregate import noise
from anysplade.study.arms import Arm, Axis
from anysplade.study.cells import CellRecord, QueryScores, Start
from anysplade.study.conclusions import conclude, summarize
from anysplade.study.controls import CONTROLS
from anysplade.study.plan import STUDIES, Cell, StudyConfig, plan
from anysplade.study.results import Baseline, ControlPair, Means, PairedTest, RowResult, RowRuns, Settings, Study, StudyResult
from anysplade.training.monitoring import Observation

QUERIES = [f"q{i}" for i in range(40)]
SETTINGS = Settings(("bert",), "pairs", ("docs",), 2, 8.0, {})


def record(value, seed, flops=1.0, k=1.0, start=1.0, wobble=0.02, per_query=None):
    per_query = per_query or {id_: value + wobble * ((i + seed) % 3 - 1) for i, id_ in enumerate(QUERIES)}
    scores = QueryScores(*[value] * 5, flops, len(per_query), 9, "hash", per_query)
    seen = {field.name: 1.0 for field in fields(Observation)} | {"document_similarity": 0.5}
    at_start = Start(**{field.name: start for field in fields(Start)} | {"logit_percentiles": {}, "histogram": {}})
    return CellRecord(
        hash="",
        cell=Cell("bert", "pairs", {}),
        options={"seed": seed},
        k=k,
        shift=0.0,
        temperature=1.0,
        backbone_fingerprint=None,
        data_hash="",
        before=at_start,
        after=at_start,
        results={"docs": scores},
        log=[{"step": 1, "grad_norm": 2.0}],
        observations=[Observation(**seen | {"step": step, "loss": 2.0 / (step + 1)}) for step in (0, 1)],
        findings=[],
        seconds=1.0,
        commands=[],
        provenance={},
    )


def planned(arm, axis, hashes, failed=()):
    """A row, its key result by its label at k = 8 or, of k alone and of the map, by its axis."""
    keys = {key.label(8.0, 0.01): key for key in Arm}
    key = keys.get(arm) or (Arm.LEVEL if "level" in axis else Arm.FIXED)
    return RowRuns(backbone="bert", key=key, arm=arm, axis=Axis(**axis), cells=hashes, failed=list(failed))


def lost(*arms):
    """Rows none of whose trainings could be run."""
    return [planned(key.label(8.0, 0.01), {}, [], ["out of memory"]) for key in arms]


def summary(name, rows, records):
    return summarize(name, rows, records, SETTINGS, {})


def study(name, table):
    """table: (arm, axis, value, flops) each; other rows that the study needs could not be run."""
    records, rows = {}, []
    for i, (arm, axis, value, flops) in enumerate(table):
        hashes = [f"{i}-{seed}" for seed in (0, 1)]
        records |= {hash_: record(value + 0.01 * seed, seed, flops, start=i + 1) for seed, hash_ in enumerate(hashes)}
        rows.append(planned(arm, axis, hashes))
    if name == "controls":
        rows += lost(*({*Arm} - {row.key for row in rows}))
    return summary(name, rows, records)


def runs(name, config, norms, failed_arm=None):
    """The rows of a plan with two trainings each, which failed for one arm."""
    rows = []
    for i, row in enumerate(plan(name, config, norms, config.backbones)):
        outcome = {"cells": [], "failed": ["it broke"] * 2} if row.key == failed_arm else {"cells": [f"{i}-0", f"{i}-1"]}
        rows.append(RowRuns(**vars(row) | outcome))
    return rows, {hash_: record(0.1 + i / 100, i % 2) for i, hash_ in enumerate(h for row in rows for h in row.cells)}


def test_means_and_deviations():
    row = study("norm", [("raw", {}, 0.3, 2.0)]).rows[0]
    assert row.results["docs"].ndcg == pytest.approx(0.305)
    assert row.results["docs"].ndcg_sd == pytest.approx(0.01 / 2**0.5)
    assert row.runs == 2


def test_main_names_collapse_and_both_directions():
    better = study("main", [("raw", {}, 0.05, 9.0), ("k=4", {}, 0.3, 4.0), ("k=8", {}, 0.4, 4.0), ("auto", {}, 0.5, 1.0)])
    assert "the raw head collapses, at 11%" in better.conclusions[0]
    assert "auto is better than the best fixed k (k=8)" in better.conclusions[1]
    assert "0.25 times its FLOPS." in better.conclusions[1]
    worse = study("main", [("raw", {}, 0.5, 9.0), ("k=8", {}, 0.5, 1.0), ("auto", {}, 0.3, 4.0)])
    assert "trains as well as the best" in worse.conclusions[0]
    assert "auto is worse than the best fixed k" in worse.conclusions[1]
    assert "4 times its FLOPS: a higher cost." in worse.conclusions[1]
    even = study("main", [("raw", {}, 0.4, 9.0), ("k=8", {}, 0.4, 1.0), ("auto", {}, 0.4, 1.0)])
    assert "no difference shown" in even.conclusions[1]
    assert {test.against for test in even.tests} == {"raw", "k=8"}
    assert "auto is better than the raw head: +0.450" in better.conclusions[2]  # each line of the table of tests is said
    assert "auto is worse than the raw head: -0.200" in worse.conclusions[2]
    assert "no difference shown between auto and the raw head" in even.conclusions[2]


@pytest.mark.parametrize(("value", "place"), [(0.6, "above"), (0.4, "below"), (0.505, "level with")])
def test_where_bm25_stands_is_said(value, place):
    table = [("raw", {}, 0.05, 9.0), ("k=8", {}, 0.4, 4.0), ("auto", {}, 0.5, 1.0)]
    line = conclude("main", study("main", table), {"docs": Baseline(value, 0.5, 0.5), "other": Baseline(0.1, 0.1, 0.1)})[-1]
    assert line == (
        f"BM25 on docs: nDCG@10 {value:.3f}, {place} the best head (bert, auto: 0.505 ± 0.007); there is no test against BM25."
    )


def test_folding_is_compared_with_the_vocabulary_as_it_is():
    table = [
        ("auto", {}, 0.3, 2.0),
        ("by case", {}, 0.4, 1.5),
        ("by case and stem", {}, 0.2, 1.0),
        ("by case, punctuation muted", {}, 0.3, 1.0),
    ]
    result = study("folding", table)
    assert [(test.head, test.against) for test in result.tests] == [(arm, "auto") for arm, *_ in table[1:]]
    better, worse, even = result.conclusions
    assert "folded by case, on docs: it is better than the vocabulary as it is: +0.100" in better
    assert "it is worse than" in worse
    assert "no difference shown" in even
    assert "FLOPS 1.50 against 2.00" in better


def test_controls_say_what_follows():
    table = [
        ("raw", {}, 0.1, 9.0),
        ("k=8", {}, 0.4, 4.0),
        ("runtime scalar 1/8", {}, 0.1, 4.0),
        ("shift alone", {}, 0.5, 1.0),
        ("untied, not scaled", {}, 0.05, 9.0),
    ]
    sentences = {pair.about: pair.conclusion for pair in study("controls", table).pairs}
    assert sentences["scale, with the step size that Adam gives it"].endswith("dividing W and b by k helps, as in the paper.")
    assert sentences["scale of the scores alone"].endswith(": no difference shown.")
    assert "Adam's k times larger relative steps" in sentences["relative step size, given the scale"]
    assert sentences["untying alone"].endswith("untying by itself does harm.")
    assert sentences["level against scale"].endswith("the level does more than the paper's scale.")
    assert "temperature" not in sentences


def test_a_difference_within_the_noise_of_the_seeds_is_none():
    rows = [planned(arm, {}, [f"{arm}-0", f"{arm}-1"]) for arm in ("raw", "k=8", "auto")]
    values = {"raw": (0.05, 0.05), "k=8": (0.2, 0.4), "auto": (0.35, 0.36)}
    records = {f"{arm}-{seed}": record(value, seed) for arm, of in values.items() for seed, value in enumerate(of)}
    main = summary("main", rows, records)
    rows += lost(*({*Arm} - {row.key for row in rows}))
    against = {test.against: test for test in main.tests}
    assert against["k=8"].p_corrected < 1e-6  # over queries, whose values hardly differ
    assert "no difference shown between auto and the best fixed k" in main.conclusions[1]
    sentences = {pair.about: pair.conclusion for pair in summary("controls", rows, records).pairs}
    # Two seeds of k=8 lie 0.2 apart: Welch's t has one degree of freedom, so two standard errors are not enough.
    assert sentences["scale, with the step size that Adam gives it"].endswith(": no difference shown.")


def test_norm_needs_three_heads_for_a_correlation():
    few = study("norm", [("raw", {}, 0.1, 1.0), ("auto", {}, 0.2, 1.0)])
    assert few.correlations == {}
    rising = study("norm", [("raw", {}, 0.1, 1.0), ("k=8", {}, 0.2, 1.0), ("auto", {}, 0.3, 1.0)])
    assert rising.correlations["heads, raw and calibrated"]["mean_row_norm"] == pytest.approx(1.0)


def test_tradeoff_and_sensitivity():
    points = [("raw", {"weight": 1}, 0.3, 10.0), ("auto", {"weight": 1}, 0.4, 2.0), ("auto", {"weight": 2}, 0.35, 1.0)]
    assert "is reached by auto with 0.355 ± 0.007 at 1.00, 10 times fewer" in study("tradeoff", points).conclusions[0]
    points = [("raw", {"weight": 1}, 0.5, 10.0), ("auto", {"weight": 1}, 0.4, 2.0)]
    assert "is not reached by auto, whose best is 0.405" in study("tradeoff", points).conclusions[0]
    line = [(f"k={k}", {"k": float(k)}, value, 5.0) for k, value in ((1, 0.1), (4, 0.4), (8, 0.39), (16, 0.2))]
    grid = [("k=1, level", {"k": 1.0, "level": 0.01}, 0.6, 1.0)]
    sentences = study("sensitivity", [*line, *grid, ("auto", {}, 0.5, 1.0)]).conclusions[0]
    assert "k alone is best at 4" in sentences
    assert "within 5% of it: k 8." in sentences
    assert "auto has 0.505 ± 0.007, 0.83 of the map's best" in sentences


def test_dynamics_keeps_every_seed():
    result = study("dynamics", [("raw", {}, 0.1, 1.0)])
    assert result.curves[0].curves.loss == [[(0, 2.0), (1, 1.0)]] * 2
    assert "ranking loss 2 in the first step and 1 in the last" in result.conclusions[0]


NOT_PLANNED_FOR_ALL = {Arm.LOWEST_NORM, Arm.HIGHEST_NORM}  # the backbone that has this norm has no such row
NEEDED = {
    "main": {Arm.RAW, Arm.FIXED, Arm.AUTO},
    "folding": {Arm.AUTO, Arm.BY_STEM, Arm.MUTED},
    "controls": {arm for control in CONTROLS for arm in (control.one, control.other)} - NOT_PLANNED_FOR_ALL,
    "norm": {Arm.RAW},
    "tradeoff": {Arm.AUTO},
    "sensitivity": {Arm.LEVEL, Arm.AUTO},
    "dynamics": set(),
}


@pytest.mark.parametrize("name", STUDIES)
def test_conclusions_and_plan_have_the_same_arms(name):
    """Every arm that the conclusions refer to is planned, under its key; no control is planned without a conclusion."""
    config = StudyConfig(name, output="out", backbones=("bert-tiny", "modernbert-tiny"), seeds=2)
    rows, records = runs(name, config, {"bert-tiny": 1.0, "modernbert-tiny": 3.0})
    result = summary(name, rows, records)
    assert result.conclusions
    if name == "controls":
        assert len(result.pairs) == 2 * len(CONTROLS) - 2  # each backbone has the other's norm alone
        assert {row.key for row in rows} == {arm for _, one, other, *_ in CONTROLS for arm in (one, other)}
    for backbone in config.backbones:
        assert {row.key for row in rows if row.backbone == backbone} >= NEEDED[name]


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("arm", Arm)
def test_rows_that_failed_are_named(name, arm):
    """None is skipped in silence, and no conclusion is drawn from what was not trained."""
    config = StudyConfig(name, output="out", backbones=("bert-tiny",), seeds=2)
    rows, records = runs(name, config, {"bert-tiny": 1.0}, arm)
    result = summary(name, rows, records)
    gone = [row for row in rows if row.failed]
    sentences = [line for line in result.conclusions if "2 of 2 trainings failed (it broke); there is no conclusion about" in line]
    assert len(sentences) == len(gone)
    assert all(row.arm in line for row, line in zip(gone, sentences, strict=True))
    assert not any("nan" in line for line in result.conclusions)
    if arm == Arm.RAW:
        assert not any("the raw head" in line for line in result.conclusions)


def test_a_row_that_lost_a_training_says_so():
    records = {hash_: record(0.2, 0) for hash_ in ("raw", "k", "auto")}
    rows = [planned("raw", {}, ["raw"], ["it broke"]), planned("k=8", {}, ["k"]), planned("auto", {}, ["auto"])]
    sentences = summary("main", rows, records).conclusions
    assert sentences[0] == "bert, raw: 1 of 2 trainings failed (it broke); its means cover the other 1."


def test_no_value_is_nan():
    """Rows that are all alike, of a single query, and of no products."""
    alike = [("raw", {}, 0.0, 0.0), ("k=8", {}, 0.0, 0.0), ("auto", {}, 0.0, 0.0)]
    for name in ("main", "norm", "controls"):
        assert "NaN" not in json.dumps(StudyResult({name: study(name, alike)}, {}, {}, {}, "").to_dict())
    records = {arm: record(value, 0, per_query={"q0": value}) for arm, value in (("raw", 0.1), ("k=8", 0.2), ("auto", 0.3))}
    result = summary("main", [planned(arm, {}, [arm]) for arm in records], records)
    assert [test.p_corrected for test in result.tests] == [1.0, 1.0]


def of_seeds(*values):
    """A row's trainings, by their main metric."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    means = Means(*[float(np.mean(values)), deviation] * 6)
    at_start = Start(**{field.name: 1.0 for field in fields(Start)} | {"logit_percentiles": {}, "histogram": {}})
    runs = {"runs": len(values), "k": 1.0, "shift": 0.0, "temperature": 1.0, "findings": []}
    return RowResult(
        **vars(planned("raw", {}, [""] * len(values))) | runs, results={"docs": means}, before=at_start, after=at_start
    )


@pytest.mark.filterwarnings("ignore:Precision loss")
@pytest.mark.parametrize(
    "one, other",
    [
        ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)),  # 4 degrees of freedom
        ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5)),  # 2
        ((0.1, 0.2), (0.3, 0.9, 0.4, 0.2)),
        ((0.2, 0.2), (0.3, 0.3)),  # no deviation at all
    ],
)
def test_the_noise_of_the_seeds_is_half_of_welchs_interval(one, other):
    found = noise(of_seeds(*one), of_seeds(*other), "docs")
    if np.ptp(one) == np.ptp(other) == 0:
        assert found == 0
    else:
        low, high = stats.ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
        assert found == pytest.approx((high - low) / 2)


@pytest.mark.parametrize("one, other", [((0.1,), (0.5, 0.6)), ((0.5, 0.6, 0.7), (0.1,)), ((0.1,), (0.9,))])
def test_a_single_training_has_no_deviation(one, other):
    assert noise(of_seeds(*one), of_seeds(*other), "docs") is None


DIFFERENCE = {"backbone": "bert", "difference": 0.1, "p": 0.001, "noise": 0.05, "p_corrected": 0.001}
TEST = PairedTest(**DIFFERENCE, collection="docs", key=Arm.FIXED, against="k=8", flops=1.0, flops_of_other=4.0)
PAIR = ControlPair(**DIFFERENCE, about="", one="a", other="b", values=("0.5", "0.4"), flops=(1.0, 4.0), conclusion="")
BETTER, WORSE = "auto is better than", "auto is worse than"
NONE, UNKNOWN = "no difference shown between auto and", "single trainings do not tell auto from"


@pytest.mark.parametrize(
    "change, said, values",
    [
        ({}, BETTER, "+0.100 ± 0.050 (p 0.001)"),
        ({"difference": -0.1}, WORSE, "-0.100 ± 0.050 (p 0.001)"),
        ({"difference": 0.0, "p_corrected": 1.0}, NONE, "+0.000 ± 0.050 (p 1)"),
        ({"p_corrected": 0.05}, NONE, "+0.100 ± 0.050 (p 0.05)"),
        ({"difference": -0.1, "p_corrected": 0.5}, NONE, "-0.100 ± 0.050 (p 0.5)"),
        ({"noise": 0.1}, NONE, "+0.100 ± 0.100 (p 0.001)"),
        ({"difference": -0.1, "noise": 0.2}, NONE, "-0.100 ± 0.200 (p 0.001)"),
        ({"noise": None}, UNKNOWN, "+0.100 (p 0.001)"),
        ({"difference": math.nan}, NONE, "+nan"),
        ({"p_corrected": math.nan}, NONE, "+0.100 ± 0.050 (p nan)"),
    ],
)
def test_what_is_said_of_a_difference(change, said, values):
    main = Study(settings=SETTINGS, rows=[], tests=[replace(TEST, **change)], conclusions=[], provenance={})
    (line,) = conclude("main", main)
    assert f"{said} the best fixed k (k=8): {values}" in line
    assert replace(TEST, **change).counts == (said in (BETTER, WORSE))
    for about, _, _, helps, harms in CONTROLS:
        (line,) = conclude("controls", replace(main, pairs=[replace(PAIR, about=about, **change)]))
        meaning = {BETTER: helps, WORSE: harms, NONE: "no difference shown", UNKNOWN: "single trainings do not tell"}[said]
        assert line.endswith(f": {meaning}.")


@pytest.mark.parametrize(
    "flops, of_other, cost",
    [
        (1.0, 4.0, "at 0.25 times its FLOPS."),
        (4.0, 4.0, "at 1 times its FLOPS."),
        (4.0, 1.0, "at 4 times its FLOPS: a higher cost."),
        (500.0, 2.0, "at 250 times its FLOPS: a higher cost."),
        (0.0, 4.0, "at 0 times its FLOPS."),
        (4.0, 0.0, "at 4.00 FLOPS against 0."),
    ],
)
def test_the_cost_is_said_in_both_directions(flops, of_other, cost):
    main = Study(
        settings=SETTINGS, rows=[], tests=[replace(TEST, flops=flops, flops_of_other=of_other)], conclusions=[], provenance={}
    )
    assert conclude("main", main)[0].endswith(cost)


@pytest.mark.parametrize(
    "raw, auto, end",
    [
        ((0.5, 1.0), (0.51, 4.0), "is reached by auto with 0.515 ± 0.007 at 4.00, 4 times as many."),  # better and dearer
        ((0.5, 4.0), (0.51, 1.0), "is reached by auto with 0.515 ± 0.007 at 1.00, 4 times fewer."),
        ((0.5, 260.0), (0.51, 1.0), "is reached by auto with 0.515 ± 0.007 at 1.00, 260 times fewer."),
        ((0.5, 1.0), (0.5, 1.0), "is reached by auto with 0.505 ± 0.007 at 1.00."),
        ((0.5, 1.0), (0.5, 0.0), "is reached by auto with 0.505 ± 0.007 at 0.00."),
        ((0.5, 0.0), (0.5, 1.0), "is reached by auto with 0.505 ± 0.007 at 1.00."),
        ((0.5, 4.0), (0.4, 1.0), "is not reached by auto, whose best is 0.405 ± 0.007 at 1.00."),  # worse and cheaper
        ((0.5, 1.0), (0.4, 4.0), "is not reached by auto, whose best is 0.405 ± 0.007 at 4.00."),
    ],
)
def test_a_tradeoff_is_said_in_both_directions(raw, auto, end):
    (line,) = study("tradeoff", [("raw", {"weight": 1}, *raw), ("auto", {"weight": 1}, *auto)]).conclusions
    assert line.endswith(end)


@pytest.mark.parametrize(
    "values, state",
    [
        ({"raw": (0.05, 0.06), "auto": (0.5, 0.5)}, "the raw head collapses, at 11%"),
        ({"raw": (0.4, 0.41), "auto": (0.5, 0.51)}, "the raw head degrades, at 80%"),
        (
            {"raw": (0.3, 0.5), "auto": (0.5, 0.6)},
            "the raw head is below the best, with no difference shown between it and auto, at 73%",
        ),
        ({"raw": (0.4,), "auto": (0.5,)}, "the raw head is below the best, but single trainings do not tell it from auto, at 80%"),
        ({"raw": (0.49, 0.5), "auto": (0.5, 0.5)}, "the raw head trains as well as the best, at 99%"),
        ({"raw": (0.6, 0.6), "auto": (0.5, 0.5)}, "the raw head trains as well as the best, at 100%"),
        ({"raw": (0.0, 0.0), "auto": (0.0, 0.0)}, "no head finds anything on docs."),
    ],
)
def test_what_is_said_of_the_raw_head(values, state):
    records = {f"{arm}-{seed}": record(value, seed) for arm, of in values.items() for seed, value in enumerate(of)}
    rows = [planned(arm, {}, [f"{arm}-{seed}" for seed in range(len(of))]) for arm, of in values.items()]
    assert state in summary("main", [*rows, *lost(Arm.FIXED)], records).conclusions[1]


def test_a_raw_head_degrades_by_the_test_of_the_table():
    """Its seeds agree, and over the queries the difference is noise: what is said of it is what its p says."""
    queries = {"raw": [0.0, 1.0] * 20, "auto": [1.0, 0.06] * 20}
    records = {
        f"{arm}-{seed}": record(sum(of) / 40, seed, per_query=dict(zip(QUERIES, of, strict=True)))
        for arm, of in queries.items()
        for seed in (0, 1)
    }
    made = summary("main", [*(planned(arm, {}, [f"{arm}-0", f"{arm}-1"]) for arm in queries), *lost(Arm.FIXED)], records)
    assert made.tests[0].p_corrected > 0.5
    assert "below the best, with no difference shown between it and auto, at 94%" in made.conclusions[1]


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({1: 0.4, 2: 0.1, 4: 0.39, 8: 0.1}, "bert: k alone is best at 1 (0.405 ± 0.007); within 5% of it: k 4."),  # 2 is not near
        ({1: 0.4, 2: 0.1}, "within 5% of it: no other k."),
        ({1: 0.39, 2: 0.4, 4: 0.39}, "within 5% of it: k 1, 4."),
        ({1: -0.005, 2: -0.005}, "bert: no k alone finds anything."),
    ],
)
def test_what_is_said_of_k(values, sentence):
    line = [(f"k={k}", {"k": float(k)}, value, 5.0) for k, value in values.items()]
    grid = [("k=1, level", {"k": 1.0, "level": 0.01}, 0.3, 1.0)]
    said = study("sensitivity", [*line, *grid, ("auto", {}, 0.2, 2.0)]).conclusions[0]
    assert sentence in said
    assert said.endswith("at 1.00 FLOPS against 5.00. auto has 0.205 ± 0.007, 0.67 of the map's best, at 2.00 FLOPS.")
