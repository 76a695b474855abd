"""What follows from a study's cells: means over seeds, paired tests, and sentences from the numbers."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from anysplade.evaluation.comparisons import SURE, holm, paired_p
from anysplade.study.arms import Arm
from anysplade.study.cells import METRIC, CellRecord
from anysplade.study.results import (
    ControlPair,
    Curve,
    Curves,
    Means,
    PairedTest,
    RowCurves,
    RowResult,
    RowRuns,
    Settings,
    Study,
    by_backbone,
    plus_minus,
)

_COLLAPSED = 0.25  # of the backbone's best row: a row below has collapsed
_NEAR = 0.95  # of the best: a row above is as good

Records = Mapping[str, CellRecord]


def summarize(name: str, rows: Sequence[RowRuns], records: Records, settings: Settings, provenance: dict[str, Any]) -> Study:
    """A study's rows with their means, and what follows from them.

    Args:
        name: of the study.
        rows: all rows of the plan.
        records: of the rows' cells, by hash.

    Raises:
        ValueError: the plan lacks a row that the conclusions refer to.
    """
    _require_planned(name, rows)
    trained = [_means(row, records, settings.collections) for row in rows if row.cells]
    first = settings.collections[0]
    study = Study(
        settings=settings,
        rows=trained,
        tests=_tests(name, trained, records, settings.collections) if name in ("main", "folding") else None,
        pairs=_pairs(trained, records, first) if name == "controls" else None,
        correlations=_correlations(trained, first) if name == "norm" else None,
        curves=[_curves(row, records) for row in trained] if name == "dynamics" else None,
        conclusions=[],
        provenance=provenance,
    )
    failures = [_failure(row) for row in rows if row.failed]
    return replace(study, conclusions=[*failures, *conclude(name, study)])


def conclude(name: str, study: Study) -> list[str]:
    """Sentences from a study's numbers alone."""
    first = study.settings.collections[0]
    if name == "main":
        return _main(study, first)
    if name == "folding":
        return _folding(study)
    if name == "controls":
        return [_conclusion(pair) for pair in study.pairs or ()]
    if name == "norm":
        return _norm(study, first)
    if name == "dynamics":
        return _dynamics(study, first)
    return _tradeoff(study.rows, first) if name == "tradeoff" else _sensitivity(study.rows, first)


# The arms that the conclusions refer to, besides the controls' pairs.
_NEEDED = {
    "main": {Arm.RAW, Arm.FIXED, Arm.AUTO},
    "folding": {Arm.AUTO, Arm.BY_STEM, Arm.MUTED},
    "norm": {Arm.RAW},
    "tradeoff": {Arm.AUTO},
    "sensitivity": {Arm.LEVEL, Arm.AUTO},
}
_NOT_OF_ALL = {Arm.LOWEST_NORM, Arm.HIGHEST_NORM}  # the backbone that has this norm itself has no such row


def _require_planned(name: str, rows: Sequence[RowRuns]) -> None:
    paired = {arm for _, one, other, *_ in _PAIRS for arm in (one, other)} - _NOT_OF_ALL
    needed = paired if name == "controls" else _NEEDED.get(name, set())
    for backbone in dict.fromkeys(row.backbone for row in rows):
        missing = needed - {row.key for row in rows if row.backbone == backbone}
        if missing:
            raise ValueError(f"{name}, {backbone}: the plan lacks {', '.join(sorted(missing))}, which the conclusions refer to")


def _failure(row: RowRuns) -> str:
    """The sentence about a row some of whose trainings failed."""
    rest = f"its means cover the other {len(row.cells)}" if row.cells else "there is no conclusion about it"
    runs = len(row.cells) + len(row.failed)
    return f"{row.backbone}, {row.label}: {len(row.failed)} of {runs} trainings failed ({row.failed[0]}); {rest}."


def _means(row: RowRuns, records: Records, collections: Sequence[str]) -> RowResult:
    trained = [records[hash_] for hash_ in row.cells]
    results = {}
    for collection in collections:
        values: dict[str, float | None] = {}
        for name in [field.name for field in fields(Means)][::2]:
            column = [getattr(record.results[collection], name) for record in trained]
            values |= {name: statistics.mean(column), f"{name}_sd": statistics.stdev(column) if len(column) > 1 else None}
        results[collection] = Means(**values)  # type: ignore[arg-type]
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


def _per_query(row: RowResult, records: Records, collection: str) -> np.ndarray:
    """(queries,): means over seeds."""
    seeds = [records[hash_].results[collection].per_query for hash_ in row.cells]
    return np.array([[values[id_] for id_ in seeds[0]] for values in seeds]).mean(axis=0)


def _difference(a: RowResult, b: RowResult, records: Records, collection: str) -> dict[str, Any]:
    """Of two rows' means, with the paired p over queries and the noise of the seeds."""
    ours, theirs = (_per_query(row, records, collection) for row in (a, b))
    return {
        "difference": a.results[collection].ndcg - b.results[collection].ndcg,
        "p": paired_p(theirs, ours),
        "noise": noise(a, b, collection),
    }


def noise(a: RowResult, b: RowResult, collection: str) -> float | None:
    """Half the width of Welch's 95 % interval of the difference of two rows' means over seeds; None if a row has one training."""
    variances = []  # of the means
    for row in (a, b):
        sd = row.results[collection].ndcg_sd
        if sd is None:
            return None
        variances.append((sd**2 / row.runs, row.runs - 1))
    total = sum(variance for variance, _ in variances)
    if not total:
        return 0.0
    freedom = total**2 / sum(variance**2 / of_one for variance, of_one in variances)
    return float(stats.t.ppf(1 - SURE / 2, freedom)) * math.sqrt(total)


def _compared(result: PairedTest | ControlPair, better: str, worse: str, none: str, unknown: str) -> str:
    """The words for a difference: one counts if it is above chance over queries and above the noise of the seeds."""
    if result.noise is None:
        return unknown
    if result.p_corrected < SURE and abs(result.difference) > result.noise:
        return better if result.difference > 0 else worse
    return none


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"


def _by_arm(rows: Sequence[RowResult]) -> dict[Arm, RowResult]:
    return {row.key: row for row in rows}


# -------------------------------------------------------------------------------------------- main


def _tests(name: str, rows: Sequence[RowResult], records: Records, collections: Sequence[str]) -> list[PairedTest]:
    """Pairs of rows of a study over the queries of each collection; Holm over all of them.

    main: ``auto`` against raw and against the fixed k that is best on the collection; folding: each folding against none.
    """
    tests = []
    for backbone, group in by_backbone(rows):
        arms = _by_arm(group)
        if Arm.AUTO not in arms:  # it failed
            continue
        for collection in collections:
            fixed = [row for row in group if row.key == Arm.FIXED]
            best = max(fixed, key=lambda row: row.results[collection].ndcg, default=None)
            pairs = [(arms[Arm.AUTO], other) for other in (arms.get(Arm.RAW), best)]
            if name == "folding":
                pairs = [(row, arms[Arm.AUTO]) for row in group if row.key != Arm.AUTO]
            for row, other in pairs:
                if other is None:  # it failed
                    continue
                tests.append(
                    PairedTest(
                        backbone=backbone,
                        collection=collection,
                        key=other.key,
                        against=other.arm,
                        **_difference(row, other, records, collection),
                        flops=row.results[collection].flops,
                        flops_of_other=other.results[collection].flops,
                        p_corrected=math.nan,
                        head=row.arm,
                    )
                )
    corrected = holm([test.p for test in tests])
    return [replace(test, p_corrected=p) for test, p in zip(tests, corrected, strict=True)]


def _folding(study: Study) -> list[str]:
    lines = []
    for test in study.tests or ():
        verdict = _compared(
            test,
            "it is better than",
            "it is worse than",
            "no difference shows between it and",
            "single trainings do not tell it from",
        )
        ours, none = (
            next(row for row in study.rows if (row.backbone, row.arm) == (test.backbone, arm)).results[test.collection]
            for arm in (test.head, test.against)
        )
        lines.append(
            f"{test.backbone} folded {test.head}, on {Path(test.collection).name}: {verdict} the vocabulary as it is: "
            f"{plus_minus(test.difference, test.noise, '+')} (p {test.p_corrected:.2g}); {ours.document_active_dims:.0f} active dims a document against "
            f"{none.document_active_dims:.0f}, FLOPS {ours.flops:.2f} against {none.flops:.2f}."
        )
    return lines


def _main(study: Study, collection: str) -> list[str]:
    lines = []
    for backbone, group in by_backbone(study.rows):
        raw = _by_arm(group).get(Arm.RAW)
        if raw is None:  # it failed
            continue
        named, place = f"{backbone} (mean row norm {raw.before.mean_row_norm:.2f})", Path(collection).name
        row = max(group, key=lambda row: row.results[collection].ndcg)
        best, ours = row.results[collection].ndcg, raw.results[collection].ndcg
        if not best:
            lines.append(f"{named}: no head finds anything on {place}.")
            continue
        tested = next((t for t in study.tests or () if (t.backbone, t.collection, t.key) == (backbone, collection, Arm.RAW)), None)
        if ours < _COLLAPSED * best:
            state = "collapses"
        elif ours >= _NEAR * best:
            state = "trains as well as the best"
        elif tested is None:  # auto failed
            state = "is below the best"
        else:
            state = _compared(
                tested,
                "degrades",
                "is better than auto and below the best",
                "is below the best, but no difference shows between it and auto",
                "is below the best, but single trainings do not tell it from auto",
            )
        lines.append(f"{named}: the raw head {state}, at {ours / best:.0%} of the backbone's best on {place}.")
    for test in study.tests or ():
        if test.key == Arm.RAW:
            continue
        verdict = _compared(
            test,
            "auto is better than",
            "auto is worse than",
            "no difference shows between auto and",
            "single trainings do not tell auto from",
        )
        cost = f"{test.flops:.2f} FLOPS against 0."
        if test.flops_of_other:
            ratio = test.flops / test.flops_of_other
            cost = f"{_times(ratio)} times its FLOPS" + ("." if ratio <= 1 else ": a higher cost.")
        lines.append(
            f"{test.backbone} on {Path(test.collection).name}: {verdict} the best fixed k ({test.against}): "
            f"{plus_minus(test.difference, test.noise, '+')} (p {test.p_corrected:.2g}), at {cost}"
        )
    return lines


# ------------------------------------------------------------------------------------------ others

_STATISTICS = ("mean_row_norm", "positive_share", "document_active_dims", "score_std", "document_similarity", "start_loss")
_RAW_HEADS = "raw heads"


def _correlations(rows: Sequence[RowResult], collection: str) -> dict[str, dict[str, float]]:
    """Spearman's, of the statistics before the first step with effectiveness, over raw heads and over all."""
    correlations: dict[str, dict[str, float]] = {}
    raw = [row for row in rows if row.key == Arm.RAW]
    for label, group in ((_RAW_HEADS, raw), ("heads, raw and calibrated", rows)):
        values = [row.results[collection].ndcg for row in group]
        if len(group) < 3 or not np.ptp(values):
            continue
        columns = {name: [getattr(row.after, name) for row in group] for name in _STATISTICS}
        correlations[label] = {
            name: float(stats.spearmanr(column, values)[0])
            for name, column in columns.items()
            if None not in column and np.ptp(column) > 0  # not NaN
        }
    return correlations


def _norm(study: Study, collection: str) -> list[str]:
    lines = []
    raw = sorted((row for row in study.rows if row.key == Arm.RAW), key=lambda row: row.before.mean_row_norm)
    for label, correlations in (study.correlations or {}).items():
        if not correlations:
            continue
        count = len(raw if label == _RAW_HEADS else study.rows)
        strongest = max(correlations, key=lambda name: abs(correlations[name]))
        norm = correlations.get("mean_row_norm")
        lines.append(
            f"Over {count} {label}, the rank correlation of {METRIC} on {Path(collection).name} with the head's mean row norm is "
            + ("undefined" if norm is None else f"{norm:+.2f}")
            + f"; the strongest correlation with a statistic before training is {correlations[strongest]:+.2f}, for {strongest.replace('_', ' ')}."
        )
    if len(raw) > 1:
        listed = "; ".join(f"{row.backbone} {row.before.mean_row_norm:.2f}: {row.results[collection].text}" for row in raw)
        lines.append(f"Raw heads by norm: {listed}.")
    return lines


def _tradeoff(rows: Sequence[RowResult], collection: str) -> list[str]:
    lines = []
    for backbone, group in by_backbone(rows):
        ours = [row.results[collection] for row in group if row.key == Arm.AUTO]
        if not ours:  # they failed
            continue
        for arm in dict.fromkeys(row.arm for row in group if row.key != Arm.AUTO):
            best = max((row.results[collection] for row in group if row.arm == arm), key=lambda point: point.ndcg)
            line = f"{backbone}: the best point of {arm} ({best.text} at {best.flops:.2f} FLOPS) is "
            reached = [point for point in ours if point.ndcg >= best.ndcg]
            if reached:
                least = min(reached, key=lambda point: point.flops)
                line += f"reached by auto with {least.text} at {least.flops:.2f}"
                if 0 < least.flops < best.flops:
                    line += f", {_times(best.flops / least.flops)} times fewer"
                elif 0 < best.flops < least.flops:
                    line += f", {_times(least.flops / best.flops)} times as many"
                line += "."
            else:
                top = max(ours, key=lambda point: point.ndcg)
                line += f"not reached by auto, whose best is {top.text} at {top.flops:.2f}."
            lines.append(line)
    return lines


def _sensitivity(rows: Sequence[RowResult], collection: str) -> list[str]:
    lines = []
    for backbone, group in by_backbone(rows):
        of_k = {row.axis.k: row.results[collection] for row in group if row.axis.k and not row.axis.level}
        if not of_k:  # they failed
            continue
        best_k, best = max(of_k.items(), key=lambda item: item[1].ndcg)
        near = [f"{k:g}" for k, means in sorted(of_k.items()) if k != best_k and means.ndcg >= _NEAR * best.ndcg]
        line = (
            f"{backbone}: k alone is best at {best_k:g} ({best.text}); within {1 - _NEAR:.0%} of it: "
            + (f"k {', '.join(near)}." if near else "no other k.")
            if best.ndcg
            else f"{backbone}: no k alone finds anything."
        )
        of_map = {row.axis: row.results[collection] for row in group if row.key == Arm.LEVEL}
        if of_map:
            at, top = max(of_map.items(), key=lambda item: item[1].ndcg)
            line += (
                f" With the level lowered too, the best of the map (k {at.k:g}, {at.level:.2%} of the logits above "
                f"zero, one seed) has {top.text}{_part(top, best, 'times as much')}, at {top.flops:.2f} FLOPS against {best.flops:.2f}."
            )
            if auto := _by_arm(group).get(Arm.AUTO):
                means = auto.results[collection]
                line += f" auto has {means.text}" + _part(means, top, "of the map's best") + f", at {means.flops:.2f} FLOPS."
        lines.append(line)
    return lines


def _part(means: Means, whole: Means, words: str) -> str:
    return f", {means.ndcg / whole.ndcg:.2f} {words}" if whole.ndcg else ""


def _curves(row: RowRuns, records: Records) -> RowCurves:
    trained = [records[hash_] for hash_ in row.cells]
    curves: dict[str, list[Curve]] = {
        field.name: [[(seen.step, _digits(getattr(seen, field.name))) for seen in record.observations] for record in trained]
        for field in fields(Curves)
        if field.name != "gradient_norm"
    }
    gradients = [[(int(entry["step"]), _digits(entry["grad_norm"])) for entry in r.log if "grad_norm" in entry] for r in trained]
    return RowCurves(row.backbone, row.key, row.arm, Curves(**curves, gradient_norm=gradients))


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def _dynamics(study: Study, collection: str) -> list[str]:
    lines = []
    for row, shown in zip(study.rows, study.curves or (), strict=True):
        loss, spread, alike = (
            [statistics.mean(curve[end][1] for curve in curves) for end in (0, -1)]
            for curves in (shown.curves.loss, shown.curves.score_std, shown.curves.document_similarity)
        )
        findings = f"; the monitor found: {', '.join(row.findings)}" if row.findings else ""
        lines.append(
            f"{row.backbone}, {row.arm}: ranking loss {loss[0]:.3g} in the first step and {loss[1]:.3g} in the last; standard deviation of "
            f"the scores {spread[0]:.3g} and {spread[1]:.3g}; cosine between documents at the end {alike[1]:.2f}; "
            f"{METRIC} {row.results[collection].text}{findings}."
        )
    return lines


# ---------------------------------------------------------------------------------------- controls


# What two arms differ in, the two, and what follows if the first one is better, and if it is worse.
_PAIRS = [
    ("scale, with the step size that Adam gives it", Arm.FIXED, Arm.RAW, "dividing W and b by k helps, as in the paper",
     "dividing W and b by k does harm"),
    ("scale of the scores alone", Arm.RUNTIME_SCALAR, Arm.RAW, "smaller scores help even at unchanged relative steps",
     "smaller scores alone do harm"),
    ("relative step size alone", Arm.LARGER_STEPS, Arm.UNTIED,
     "larger relative steps of the head help without any scale", "larger relative steps of the head alone do harm"),
    ("relative step size, given the scale", Arm.FIXED, Arm.RUNTIME_SCALAR,
     "Adam's k times larger relative steps on W help, at the same scale",
     "Adam's k times larger relative steps on W do harm, at the same scale"),
    ("where the scale sits (same function at the start)", Arm.FIXED, Arm.FOLDED,
     "the same function at the start ends better with W/k than with the LayerNorm scaled and the tie kept",
     "the same function at the start ends worse with W/k than with the LayerNorm scaled and the tie kept"),
    ("norm of W without the scale", Arm.SMALL_NORM, Arm.RAW,
     "a small norm of W helps although the function at the start is the raw one",
     "a small norm of W by itself does harm: it is not the norm that helps"),
    ("untying alone", Arm.UNTIED, Arm.RAW, "untying helps by itself", "untying by itself does harm"),
    ("tie under W/k", Arm.FIXED, Arm.LEFT_TIED, "leaving the tie loses: the input embeddings shrink too",
     "leaving the tie is better here"),
    ("bias", Arm.BIAS_KEPT, Arm.FIXED, "keeping the bias is better than dividing it", "keeping the bias is worse than dividing it"),
    ("temperature", Arm.TEMPERATURE, Arm.RAW, "a temperature in the loss helps", "a temperature in the loss does harm"),
    ("temperature against scale", Arm.FIXED, Arm.TEMPERATURE,
     "the scale does more than a temperature of the same spread of scores",
     "the scale does less than a temperature of the same spread of scores"),
    ("level alone", Arm.SHIFT_ALONE, Arm.RAW, "lowering the level helps, at the raw head's norm", "lowering the level alone does harm"),
    ("level against scale", Arm.SHIFT_ALONE, Arm.FIXED, "the level does more than the paper's scale",
     "the level does less than the paper's scale"),
    ("scale after level", Arm.AUTO, Arm.SHIFT_ALONE, "choosing the scale too adds to the level",
     "choosing the scale too takes from the level"),
    ("level after scale", Arm.AUTO, Arm.SCALE_ALONE, "lowering the level adds to a chosen scale",
     "lowering the level takes from a chosen scale"),
    ("another backbone's higher norm", Arm.HIGHEST_NORM, Arm.RAW, "a larger norm helps", "a larger norm does harm"),
    ("another backbone's lower norm", Arm.LOWEST_NORM, Arm.RAW, "a smaller norm helps", "a smaller norm does harm"),
]  # fmt: skip


def _pairs(rows: Sequence[RowResult], records: Records, collection: str) -> list[ControlPair]:
    """Pairs of rows that differ in one thing, each with its conclusion; Holm over all of them."""
    pairs = []
    for backbone, group in by_backbone(rows):
        arms = _by_arm(group)
        for about, one, other, *_ in _PAIRS:
            if one not in arms or other not in arms:  # it failed, or is not of this backbone
                continue
            a, b = (arms[key].results[collection] for key in (one, other))
            pairs.append(
                ControlPair(
                    backbone=backbone,
                    about=about,
                    one=arms[one].arm,
                    other=arms[other].arm,
                    **_difference(arms[one], arms[other], records, collection),
                    values=(a.text, b.text),
                    flops=(a.flops, b.flops),
                    p_corrected=math.nan,
                    conclusion="",
                )
            )
    corrected = holm([pair.p for pair in pairs])
    pairs = [replace(pair, p_corrected=p) for pair, p in zip(pairs, corrected, strict=True)]
    return [replace(pair, conclusion=_conclusion(pair)) for pair in pairs]


def _conclusion(pair: ControlPair) -> str:
    helps, harms = next((helps, harms) for about, _, _, helps, harms in _PAIRS if about == pair.about)
    meaning = _compared(pair, helps, harms, "no difference shows", "single trainings do not tell")
    return (
        f"{pair.backbone}, {pair.about}: {pair.one} {pair.values[0]} against {pair.other} {pair.values[1]} "
        f"({plus_minus(pair.difference, pair.noise, '+')}, p {pair.p_corrected:.2g}; FLOPS {pair.flops[0]:.2f} and {pair.flops[1]:.2f}): {meaning}."
    )
