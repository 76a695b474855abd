"""The numbers of a study: means over seeds, tests between rows, correlations and curves."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import numpy as np
from scipy import stats

from anysplade.evaluation.significance import SIGNIFICANT, holm, paired_p
from anysplade.study.arms import Arm
from anysplade.study.cells import CellRecord, QueryScores
from anysplade.study.controls import CONTROLS
from anysplade.study.results import ControlPair, Curve, Curves, Means, PairedTest, RowCurves, RowResult, RowRuns, by_backbone

RAW_HEADS = "raw heads"
_STATISTICS = ("mean_row_norm", "positive_share", "document_active_dims", "score_std", "document_similarity", "start_loss")
_FEWEST_HEADS = 3  # for a correlation

Records = Mapping[str, CellRecord]  # by hash
Tested = TypeVar("Tested", PairedTest, ControlPair)


def means(row: RowRuns, records: Records, collections: Sequence[str]) -> RowResult:
    """A row with its means over seeds."""
    trained = [records[hash_] for hash_ in row.cells]
    results = {}
    for collection in collections:
        values: dict[str, Any] = {}
        for name in [field.name for field in fields(Means)][::2]:  # each is followed by its standard deviation
            column = [getattr(record.results[collection], name) for record in trained]
            values |= {name: statistics.mean(column), f"{name}_sd": statistics.stdev(column) if len(column) > 1 else None}
        results[collection] = Means(**values)
    return RowResult(
        **vars(row),
        runs=len(trained),
        k=statistics.mean(record.k for record in trained),
        shift=statistics.mean(record.shift for record in trained),
        temperature=trained[0].temperature,
        results=results,
        before=trained[0].before,
        after=trained[0].after,
        findings=sorted({finding["name"] for record in trained for finding in record.findings}),
    )


def by_arm(rows: Sequence[RowResult]) -> dict[Arm, RowResult]:
    return {row.key: row for row in rows}


def paired_tests(name: str, rows: Sequence[RowResult], records: Records, collections: Sequence[str]) -> list[PairedTest]:
    """Test pairs of rows over the queries of each collection, corrected together (Holm).

    The main study tests ``auto`` against raw and against the best fixed k of the collection; the folding study tests each folding
    against none.
    """
    tests = []
    for _, group in by_backbone(rows):
        auto = by_arm(group).get(Arm.AUTO)
        if auto is None:  # it failed
            continue
        for collection in collections:
            if name == "folding":
                pairs = [(row, auto) for row in group if row is not auto]
            else:
                raw, fixed = ([row for row in group if row.key == key] for key in (Arm.RAW, Arm.FIXED))
                best = sorted(fixed, key=lambda row: -row.results[collection].ndcg)[:1]
                pairs = [(auto, other) for other in (*raw, *best)]
            tests += [
                PairedTest(
                    collection=collection,
                    key=other.key,
                    against=other.arm,
                    flops=row.results[collection].flops,
                    flops_of_other=other.results[collection].flops,
                    head=row.arm,
                    **_difference(row, other, records, collection),
                )
                for row, other in pairs
            ]
    return _corrected(tests)


def control_pairs(rows: Sequence[RowResult], records: Records, collection: str) -> list[ControlPair]:
    """Test the pairs of rows that differ in one thing, corrected together (Holm); the conclusions are empty."""
    pairs = []
    for _, group in by_backbone(rows):
        arms = by_arm(group)
        for about, one, other, *_ in CONTROLS:
            if one not in arms or other not in arms:  # it failed, or the backbone has no such row
                continue
            a, b = (arms[key].results[collection] for key in (one, other))
            pairs.append(
                ControlPair(
                    about=about,
                    one=arms[one].arm,
                    other=arms[other].arm,
                    values=(a.text, b.text),
                    flops=(a.flops, b.flops),
                    conclusion="",
                    **_difference(arms[one], arms[other], records, collection),
                )
            )
    return _corrected(pairs)


def _corrected(tests: Sequence[Tested]) -> list[Tested]:
    return [replace(test, p_corrected=p) for test, p in zip(tests, holm([test.p for test in tests]), strict=True)]


def _difference(a: RowResult, b: RowResult, records: Records, collection: str) -> dict[str, Any]:
    """Difference of two rows' means, its paired p over queries, not yet corrected, and the noise of the seeds."""
    ours, theirs = (per_query([records[hash_].results[collection] for hash_ in row.cells]) for row in (a, b))
    return {
        "backbone": a.backbone,
        "difference": a.results[collection].ndcg - b.results[collection].ndcg,
        "p": paired_p(theirs, ours),
        "noise": noise(a, b, collection),
        "p_corrected": math.nan,
    }


def per_query(seeds: Sequence[QueryScores]) -> np.ndarray:
    """Main metric of each query, mean over seeds, (queries,)."""
    return np.array([[scores.per_query[id_] for id_ in seeds[0].per_query] for scores in seeds]).mean(axis=0)


def noise(a: RowResult, b: RowResult, collection: str) -> float | None:
    """Half the width of Welch's 95 % interval for the difference of two means over seeds; None if a row has one training."""
    (sd_a, runs_a), (sd_b, runs_b) = ((row.results[collection].ndcg_sd, row.runs) for row in (a, b))
    if sd_a is None or sd_b is None:
        return None
    of_a, of_b = sd_a**2 / runs_a, sd_b**2 / runs_b  # variances of the means
    if not of_a + of_b:
        return 0.0
    freedom = (of_a + of_b) ** 2 / (of_a**2 / (runs_a - 1) + of_b**2 / (runs_b - 1))
    return float(stats.t.ppf(1 - SIGNIFICANT / 2, freedom)) * (of_a + of_b) ** 0.5


def correlations(rows: Sequence[RowResult], collection: str) -> dict[str, dict[str, float]]:
    """Spearman correlations of effectiveness with the statistics before the first step, over raw heads and over all heads."""
    found: dict[str, dict[str, float]] = {}
    raw = [row for row in rows if row.key == Arm.RAW]
    for label, group in ((RAW_HEADS, raw), ("heads, raw and calibrated", rows)):
        values = [row.results[collection].ndcg for row in group]
        if len(group) < _FEWEST_HEADS or not np.ptp(values):
            continue
        columns = {name: [getattr(row.after, name) for row in group] for name in _STATISTICS}
        found[label] = {
            name: float(stats.spearmanr(column, values)[0])
            for name, column in columns.items()
            if None not in column and np.ptp(column) > 0  # otherwise undefined
        }
    return found


def training_curves(row: RowRuns, records: Records) -> RowCurves:
    """The quantities that the monitor observed, and the gradient norm, over the steps."""
    trained = [records[hash_] for hash_ in row.cells]
    curves: dict[str, list[Curve]] = {
        field.name: [[(seen.step, _digits(getattr(seen, field.name))) for seen in record.observations] for record in trained]
        for field in fields(Curves)
        if field.name != "gradient_norm"
    }
    gradients = [[(int(entry["step"]), _digits(entry["grad_norm"])) for entry in r.log if "grad_norm" in entry] for r in trained]
    return RowCurves(row.backbone, row.key, row.arm, Curves(**curves, gradient_norm=gradients))


def _digits(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")
