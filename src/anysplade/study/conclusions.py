"""Sentences that follow from the numbers of a study."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from anysplade.evaluation.significance import Verdict
from anysplade.study.aggregate import RAW_HEADS, Records, by_arm, control_pairs, correlations, means, paired_tests, training_curves
from anysplade.study.arms import Arm
from anysplade.study.cells import METRIC
from anysplade.study.controls import CONTROLS
from anysplade.study.results import (
    Baseline,
    ControlPair,
    Means,
    PairedTest,
    RowResult,
    RowRuns,
    Settings,
    Study,
    by_backbone,
    plus_minus,
)

_COLLAPSED = 0.25  # share of the backbone's best row; a raw head below it has collapsed
_NEAR = 0.95  # share of the best; a row above it is as good


def summarize(
    name: str,
    rows: Sequence[RowRuns],
    records: Records,
    settings: Settings,
    provenance: dict[str, Any],
    bm25: Mapping[str, Baseline] | None = None,
) -> Study:
    """All rows of a study's plan with their means, and what follows from them and from BM25 on each collection."""
    trained = [means(row, records, settings.collections) for row in rows if row.cells]
    first = settings.collections[0]
    pairs = control_pairs(trained, records, first) if name == "controls" else None
    study = Study(
        settings=settings,
        rows=trained,
        tests=paired_tests(name, trained, records, settings.collections) if name in ("main", "folding") else None,
        pairs=pairs and [replace(pair, conclusion=_control(pair)) for pair in pairs],
        correlations=correlations(trained, first) if name == "norm" else None,
        curves=[training_curves(row, records) for row in trained] if name == "dynamics" else None,
        conclusions=[],
        provenance=provenance,
    )
    return replace(study, conclusions=[*(_failure(row) for row in rows if row.failed), *conclude(name, study, bm25)])


def _failure(row: RowRuns) -> str:
    """The sentence about a row with failed trainings."""
    rest = f"its means cover the other {len(row.cells)}" if row.cells else "there is no conclusion about it"
    runs = len(row.cells) + len(row.failed)
    return f"{row.backbone}, {row.label}: {len(row.failed)} of {runs} trainings failed ({row.failed[0]}); {rest}."


def conclude(name: str, study: Study, bm25: Mapping[str, Baseline] | None = None) -> list[str]:
    """Sentences that follow from the numbers of a study and of BM25 alone."""
    first, against_bm25 = study.settings.collections[0], _bm25(study, bm25 or {})
    sentences: dict[str, Iterator[str]] = {
        "main": chain(_raw_heads(study, first), _auto_against_others(study), against_bm25),
        "folding": chain(_folding(study), against_bm25),
        "controls": map(_control, study.pairs or ()),
        "norm": _norm(study, first),
        "dynamics": _dynamics(study, first),
        "tradeoff": _tradeoff(study.rows, first),
        "sensitivity": _sensitivity(study.rows, first),
    }
    return list(sentences[name])


def _in_words(test: PairedTest | ControlPair, better: str, worse: str, none: str, unknown: str) -> str:
    """The words for a difference."""
    return {Verdict.BETTER: better, Verdict.WORSE: worse, Verdict.NONE: none, None: unknown}[test.verdict]


def _relation(test: PairedTest, subject: str) -> str:
    return _in_words(
        test,
        f"{subject} is better than",
        f"{subject} is worse than",
        f"{Verdict.NONE} between {subject} and",
        f"single trainings do not tell {subject} from",
    )


def _size(test: PairedTest) -> str:
    return f"{plus_minus(test.difference, test.noise, '+')} (p {test.p_corrected:.2g})"


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"


# Rows and lists below are empty, or an arm is missing, only where trainings failed: a test compares these arms with the plan's.


def _raw_heads(study: Study, collection: str) -> Iterator[str]:
    for backbone, group in by_backbone(study.rows):
        raw = by_arm(group).get(Arm.RAW)
        if raw is None:
            continue
        named, place = f"{backbone} (mean row norm {raw.before.mean_row_norm:.2f})", Path(collection).name
        best, ours = max(row.results[collection].ndcg for row in group), raw.results[collection].ndcg
        if not best:
            yield f"{named}: no head finds anything on {place}."
            continue
        test = next((t for t in study.tests or () if (t.backbone, t.collection, t.key) == (backbone, collection, Arm.RAW)), None)
        if ours < _COLLAPSED * best:
            state = "collapses"
        elif ours >= _NEAR * best:
            state = "trains as well as the best"
        elif test is None:
            state = "is below the best"
        else:
            state = _in_words(
                test,
                "degrades",
                "is better than auto and below the best",
                f"is below the best, with {Verdict.NONE} between it and auto",
                "is below the best, but single trainings do not tell it from auto",
            )
        yield f"{named}: the raw head {state}, at {ours / best:.0%} of the backbone's best on {place}."


def _auto_against_others(study: Study) -> Iterator[str]:
    for test in sorted(study.tests or (), key=lambda test: test.key == Arm.RAW):
        other = "the raw head" if test.key == Arm.RAW else f"the best fixed k ({test.against})"
        cost = f"{test.flops:.2f} FLOPS against 0."
        if test.flops_of_other:
            ratio = test.flops / test.flops_of_other
            cost = f"{_times(ratio)} times its FLOPS" + ("." if ratio <= 1 else ": a higher cost.")
        place = Path(test.collection).name
        yield f"{test.backbone} on {place}: {_relation(test, 'auto')} {other}: {_size(test)}, at {cost}"


def _bm25(study: Study, bm25: Mapping[str, Baseline]) -> Iterator[str]:
    for collection in study.settings.collections:
        if collection in bm25 and study.rows:
            ours, best = bm25[collection].ndcg, max(study.rows, key=lambda row: row.results[collection].ndcg)
            value = best.results[collection]
            place = "above" if ours > value.ndcg else "below" if ours < value.ndcg else "level with"
            yield (
                f"BM25 on {Path(collection).name}: {METRIC} {ours:.3f}, {place} the best head "
                f"({best.backbone}, {best.label}: {value.text}); there is no test against BM25."
            )


def _folding(study: Study) -> Iterator[str]:
    for test in study.tests or ():
        ours, none = (
            next(row for row in study.rows if (row.backbone, row.arm) == (test.backbone, arm)).results[test.collection]
            for arm in (test.head, test.against)
        )
        yield (
            f"{test.backbone} folded {test.head}, on {Path(test.collection).name}: {_relation(test, 'it')} the vocabulary as it is: {_size(test)}; "
            f"{ours.document_active_dims:.0f} active dims per document against {none.document_active_dims:.0f}, FLOPS {ours.flops:.2f} against {none.flops:.2f}."
        )


def _control(pair: ControlPair) -> str:
    control = next(control for control in CONTROLS if control.about == pair.about)
    meaning = _in_words(pair, control.better, control.worse, Verdict.NONE, "single trainings do not tell")
    return (
        f"{pair.backbone}, {pair.about}: {pair.one} {pair.values[0]} against {pair.other} {pair.values[1]} "
        f"({plus_minus(pair.difference, pair.noise, '+')}, p {pair.p_corrected:.2g}; FLOPS {pair.flops[0]:.2f} and {pair.flops[1]:.2f}): {meaning}."
    )


def _norm(study: Study, collection: str) -> Iterator[str]:
    raw = sorted((row for row in study.rows if row.key == Arm.RAW), key=lambda row: row.before.mean_row_norm)
    for label, found in (study.correlations or {}).items():
        if not found:
            continue
        count = len(raw if label == RAW_HEADS else study.rows)
        strongest = max(found, key=lambda name: abs(found[name]))
        norm = f"{found['mean_row_norm']:+.2f}" if "mean_row_norm" in found else "undefined"
        yield (
            f"Over {count} {label}, the rank correlation of {METRIC} on {Path(collection).name} with the head's mean row norm is {norm}; "
            f"the strongest correlation with a statistic before training is {found[strongest]:+.2f}, for {strongest.replace('_', ' ')}."
        )
    if len(raw) > 1:
        listed = "; ".join(f"{row.backbone} {row.before.mean_row_norm:.2f}: {row.results[collection].text}" for row in raw)
        yield f"Raw heads by norm: {listed}."


def _dynamics(study: Study, collection: str) -> Iterator[str]:
    for row, shown in zip(study.rows, study.curves or (), strict=True):
        loss, spread, similarity = (
            [statistics.mean(curve[end][1] for curve in curves) for end in (0, -1)]
            for curves in (shown.curves.loss, shown.curves.score_std, shown.curves.document_similarity)
        )
        findings = f"; the monitor found: {', '.join(row.findings)}" if row.findings else ""
        yield (
            f"{row.backbone}, {row.arm}: ranking loss {loss[0]:.3g} in the first step and {loss[1]:.3g} in the last; standard deviation of "
            f"the scores {spread[0]:.3g} and {spread[1]:.3g}; cosine between documents at the end {similarity[1]:.2f}; "
            f"{METRIC} {row.results[collection].text}{findings}."
        )


def _tradeoff(rows: Sequence[RowResult], collection: str) -> Iterator[str]:
    for backbone, group in by_backbone(rows):
        ours = [row.results[collection] for row in group if row.key == Arm.AUTO]
        if not ours:
            continue
        top = max(ours, key=lambda point: point.ndcg)
        for arm in dict.fromkeys(row.arm for row in group if row.key != Arm.AUTO):
            best = max((row.results[collection] for row in group if row.arm == arm), key=lambda point: point.ndcg)
            line = f"not reached by auto, whose best is {top.text} at {top.flops:.2f}"
            if reached := [point for point in ours if point.ndcg >= best.ndcg]:
                least = min(reached, key=lambda point: point.flops)
                line = f"reached by auto with {least.text} at {least.flops:.2f}"
                if 0 < least.flops < best.flops:
                    line += f", {_times(best.flops / least.flops)} times fewer"
                elif 0 < best.flops < least.flops:
                    line += f", {_times(least.flops / best.flops)} times as many"
            yield f"{backbone}: the best point of {arm} ({best.text} at {best.flops:.2f} FLOPS) is {line}."


def _sensitivity(rows: Sequence[RowResult], collection: str) -> Iterator[str]:
    for backbone, group in by_backbone(rows):
        k_alone = {row.axis.k: row.results[collection] for row in group if row.axis.k and not row.axis.level}
        if not k_alone:
            continue
        best_k, best = max(k_alone.items(), key=lambda item: item[1].ndcg)
        near = [f"{k:g}" for k, point in sorted(k_alone.items()) if k != best_k and point.ndcg >= _NEAR * best.ndcg]
        line = f"{backbone}: no k alone finds anything."
        if best.ndcg:
            others = f"k {', '.join(near)}." if near else "no other k."
            line = f"{backbone}: k alone is best at {best_k:g} ({best.text}); within {1 - _NEAR:.0%} of it: {others}"
        grid = {row.axis: row.results[collection] for row in group if row.key == Arm.LEVEL}
        if grid:
            at, top = max(grid.items(), key=lambda item: item[1].ndcg)
            line += (
                f" With the level lowered too, the best of the map (k {at.k:g}, {at.level:.2%} of the logits above "
                f"zero, one seed) has {top.text}{_part(top, best, 'times as much')}, at {top.flops:.2f} FLOPS against {best.flops:.2f}."
            )
            if auto := by_arm(group).get(Arm.AUTO):
                ours = auto.results[collection]
                line += f" auto has {ours.text}" + _part(ours, top, "of the map's best") + f", at {ours.flops:.2f} FLOPS."
        yield line


def _part(point: Means, whole: Means, words: str) -> str:
    return f", {point.ndcg / whole.ndcg:.2f} {words}" if whole.ndcg else ""
