"""What a study's cells say: means over seeds, tests, and sentences made from the numbers."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from anysplade.evaluation.comparisons import holm, paired_p
from anysplade.study.arms import Arm
from anysplade.study.cells import COSTS, METRICS

METRIC = METRICS[0]
_SURE = 0.05  # p below which a difference counts, if it is above the noise of the seeds too
_COLLAPSED = 0.25  # of the backbone's best row, below which a row is said to have collapsed
_NEAR = 0.95  # of the best, above which a row is said to be as good

Row = dict[str, Any]


def summarize(name: str, rows: Sequence[Row], records: Mapping[str, dict[str, Any]], collections: Sequence[str]) -> dict[str, Any]:
    """A study's rows with their means, and what follows from them.

    Args:
        rows: all that were planned: ``backbone``, ``key``, ``arm``, ``axis``, ``cells`` (the hashes of its records) and
            ``failed`` (the messages of its other trainings) each.

    Raises:
        ValueError: a row that the conclusions rest on was not planned.
    """
    made = [_row(row, records, collections) for row in rows if row["cells"]]
    summary: dict[str, Any] = {"rows": made}
    first = collections[0]
    _require_planned(name, rows)
    if name == "main":
        tests = _tests(made, records, collections)
        summary |= {"tests": tests, "conclusions": _main(made, tests, collections)}
    elif name == "controls":
        pairs = _controls(made, records, first)
        summary |= {"pairs": pairs, "conclusions": [pair["said"] for pair in pairs]}
    elif name == "norm":
        correlations = _correlations(made, first)
        summary |= {"correlations": correlations, "conclusions": _norm(made, correlations, first)}
    elif name == "dynamics":
        summary |= {"curves": [_curves(row, records) for row in made], "conclusions": _dynamics(made, records, first)}
    elif name == "tradeoff":
        summary["conclusions"] = _tradeoff(made, first)
    else:
        summary["conclusions"] = _sensitivity(made, first)
    summary["conclusions"] = [_failure(row) for row in rows if row["failed"]] + summary["conclusions"]
    return summary


# What the conclusions refer to, besides the controls' pairs.
_NEEDED = {
    "main": {Arm.RAW, Arm.FIXED, Arm.AUTO},
    "norm": {Arm.RAW},
    "tradeoff": {Arm.AUTO},
    "sensitivity": {Arm.LEVEL, Arm.AUTO},
}
_NOT_OF_ALL = {Arm.LOWEST_NORM, Arm.HIGHEST_NORM}  # a backbone that has this norm itself has no such row


def _require_planned(name: str, rows: Sequence[Row]) -> None:
    paired = {arm for _, one, other, *_ in _PAIRS for arm in (one, other)} - _NOT_OF_ALL
    needed = paired if name == "controls" else _NEEDED.get(name, set())
    for backbone, of in _by_backbone(rows).items():
        missing = needed - {row["key"] for row in of}
        if missing:
            raise ValueError(f"{name}, {backbone}: the plan lacks {', '.join(sorted(missing))}, which the conclusions refer to")


def _failure(row: Row) -> str:
    """What is said of a row that has not all of its trainings."""
    runs = len(row["cells"]) + len(row["failed"])
    rest = f"its means are of the other {len(row['cells'])}" if row["cells"] else "nothing follows about it"
    weight = f", weight {row['axis']['weight']:g}" if "weight" in row["axis"] else ""
    return f"{row['backbone']}, {row['arm']}{weight}: {len(row['failed'])} of {runs} trainings failed ({row['failed'][0]}); {rest}."


def _row(row: Row, records: Mapping[str, dict[str, Any]], collections: Sequence[str]) -> Row:
    of = [records[hash_] for hash_ in row["cells"]]
    results: dict[str, Any] = {}
    for name in collections:
        results[name] = {}
        for key in (*METRICS, *COSTS):
            values = [record["results"][name][key] for record in of]
            results[name][key] = statistics.mean(values)
            results[name][f"{key} sd"] = statistics.stdev(values) if len(values) > 1 else None
    return row | {
        "runs": len(of),
        "k": statistics.mean(record["k"] for record in of),
        "shift": statistics.mean(record["shift"] for record in of),
        "temperature": of[0]["temperature"],
        "results": results,
        "before": of[0]["before"],
        "after": of[0]["after"],
        "findings": sorted({finding["name"] for record in of for finding in record["findings"]}),
    }


def _value(row: Row, collection: str) -> float:
    return row["results"][collection][METRIC]


def _per_query(row: Row, records: Mapping[str, dict[str, Any]], collection: str) -> np.ndarray:
    """(queries,): means over seeds."""
    of = [records[hash_]["results"][collection]["per_query"] for hash_ in row["cells"]]
    return np.array([[values[id_] for id_ in of[0]] for values in of]).mean(axis=0)


def _noise(a: Row, b: Row, collection: str) -> float:
    """Two standard errors, over seeds, of the difference of two rows' means; 0 of single runs, which do not tell."""
    deviations = [(row["results"][collection][f"{METRIC} sd"] or 0.0, row["runs"]) for row in (a, b)]
    return 2 * math.sqrt(sum(sd**2 / runs for sd, runs in deviations))


def _counts(found: Mapping[str, Any]) -> bool:
    """A difference is above chance over queries, and above the noise of the seeds."""
    return found["p_corrected"] < _SURE and abs(found["difference"]) > found["noise"]


def _by_arm(rows: Sequence[Row]) -> dict[Arm, Row]:
    return {row["key"]: row for row in rows}


def _by_backbone(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["backbone"], []).append(row)
    return found


def _said(row: Row, collection: str) -> str:
    value, sd = _value(row, collection), row["results"][collection][f"{METRIC} sd"]
    return f"{value:.3f}" + (f" ± {sd:.3f}" if sd is not None else "")


def _flops(row: Row, collection: str) -> float:
    return row["results"][collection]["flops"]


# -------------------------------------------------------------------------------------------- main


def _tests(rows: Sequence[Row], records: Mapping[str, dict[str, Any]], collections: Sequence[str]) -> list[dict[str, Any]]:
    """``auto`` against raw and against the fixed k that is best on each collection; Holm over all of them."""
    tests = []
    for backbone, of in _by_backbone(rows).items():
        arms = _by_arm(of)
        fixed = [row for row in of if row["key"] == Arm.FIXED]
        for collection in collections:
            others = [arms.get(Arm.RAW), max(fixed, key=lambda row: _value(row, collection), default=None)]
            for other in others:
                if other is None or Arm.AUTO not in arms:  # they failed
                    continue
                ours, theirs = (_per_query(row, records, collection) for row in (arms[Arm.AUTO], other))
                costs = [_flops(row, collection) for row in (arms[Arm.AUTO], other)]
                tests.append(
                    {
                        "backbone": backbone,
                        "collection": collection,
                        "against": other["arm"],
                        "key": other["key"],
                        "difference": float((ours - theirs).mean()),
                        "p": paired_p(theirs, ours),
                        "noise": _noise(arms[Arm.AUTO], other, collection),
                        "flops": costs[0],
                        "flops of the other": costs[1],
                    }
                )
    for test, p in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_corrected"] = p
    return tests


def _main(rows: Sequence[Row], tests: Sequence[dict[str, Any]], collections: Sequence[str]) -> list[str]:
    said = []
    for backbone, of in _by_backbone(rows).items():
        raw = _by_arm(of).get(Arm.RAW)
        if raw is None:  # it failed
            continue
        first = collections[0]
        best = max(_value(row, first) for row in of)
        share = _value(raw, first) / best if best else 1.0
        state = "collapses" if share < _COLLAPSED else "degrades" if share < _NEAR else "trains as well as the best"
        said.append(
            f"{backbone} (mean row norm {raw['before']['mean_row_norm']:.2f}): the raw head {state}, at {share:.0%} of the backbone's best on {Path(first).name}."
        )
    for test in tests:
        if test["key"] == Arm.RAW:
            continue
        sure = _counts(test)
        better = test["difference"] > 0
        ratio = test["flops"] / test["flops of the other"] if test["flops of the other"] else None
        cost = (
            f"{test['flops']:.2f} FLOPS against 0."
            if ratio is None
            else f"{ratio:.2g} times its FLOPS" + ("." if ratio <= 1 else ": a higher cost.")
        )
        verdict = (
            "auto is better than" if sure and better else "auto is worse than" if sure else "no difference shows between auto and"
        )
        said.append(
            f"{test['backbone']} on {Path(test['collection']).name}: {verdict} the best fixed k ({test['against']}), by {test['difference']:+.3f} "
            f"(p {test['p_corrected']:.2g}), at {cost}"
        )
    return said


# ------------------------------------------------------------------------------------------ others

_STATISTICS = ("mean_row_norm", "positive_share", "document_active_dims", "score_std", "document_similarity", "start_loss")


def _correlations(rows: Sequence[Row], collection: str) -> dict[str, dict[str, float]]:
    """Spearman's, of what is known before the first step with effectiveness, over raw heads and over all."""
    found: dict[str, dict[str, float]] = {}
    for label, of in (("raw heads", [row for row in rows if row["key"] == Arm.RAW]), ("heads, raw and calibrated", list(rows))):
        values = [_value(row, collection) for row in of]
        if len(of) < 3 or not np.ptp(values):
            continue
        known = {name: [row["after"][name] for row in of] for name in _STATISTICS}
        found[label] = {
            name: float(stats.spearmanr(column, values)[0])
            for name, column in known.items()
            if None not in column and np.ptp(column)
        }
    return found


def _norm(rows: Sequence[Row], correlations: dict[str, dict[str, float]], collection: str) -> list[str]:
    said = []
    for label, found in correlations.items():
        if not found:
            continue
        count = sum(1 for row in rows if label != "raw heads" or row["key"] == Arm.RAW)
        strongest = max(found, key=lambda name: abs(found[name]))
        norm = found.get("mean_row_norm")
        said.append(
            f"Over {count} {label}, {METRIC} on {Path(collection).name} goes with the head's mean row norm at rank correlation "
            + ("that cannot be told" if norm is None else f"{norm:+.2f}")
            + f"; the strongest of what is known before training is {strongest.replace('_', ' ')}, at {found[strongest]:+.2f}."
        )
    raw = sorted((row for row in rows if row["key"] == Arm.RAW), key=lambda row: row["before"]["mean_row_norm"])
    if len(raw) > 1:
        listed = "; ".join(f"{row['backbone']} {row['before']['mean_row_norm']:.2f}: {_said(row, collection)}" for row in raw)
        said.append(f"Raw heads by norm: {listed}.")
    return said


def _tradeoff(rows: Sequence[Row], collection: str) -> list[str]:
    said = []
    for backbone, of in _by_backbone(rows).items():
        ours = [row for row in of if row["key"] == Arm.AUTO]
        if not ours:  # they failed
            continue
        for arm in dict.fromkeys(row["arm"] for row in of if row["key"] != Arm.AUTO):
            theirs = [row for row in of if row["arm"] == arm]
            best = max(theirs, key=lambda row: _value(row, collection))
            match = [row for row in ours if _value(row, collection) >= _value(best, collection)]
            if match:
                least = min(match, key=lambda row: _flops(row, collection))
                saved = _flops(best, collection) / max(_flops(least, collection), 1e-9)
                said.append(
                    f"{backbone}: the best point of {arm} ({_said(best, collection)} at {_flops(best, collection):.2f} FLOPS) is reached "
                    f"by auto with {_said(least, collection)} at {_flops(least, collection):.2f}, {saved:,.{0 if saved >= 10 else 1}f} times fewer."
                )
            else:
                top = max(ours, key=lambda row: _value(row, collection))
                said.append(
                    f"{backbone}: the best point of {arm} ({_said(best, collection)} at {_flops(best, collection):.2f} FLOPS) is not "
                    f"reached by auto, whose best is {_said(top, collection)} at {_flops(top, collection):.2f}."
                )
    return said


def _sensitivity(rows: Sequence[Row], collection: str) -> list[str]:
    said = []
    for backbone, of in _by_backbone(rows).items():
        line = [row for row in of if row["axis"].keys() == {"k"}]
        grid = [row for row in of if row["key"] == Arm.LEVEL]
        auto = _by_arm(of).get(Arm.AUTO)
        if not line:  # they failed
            continue
        best = max(line, key=lambda row: _value(row, collection))
        near = [row["axis"]["k"] for row in line if _value(row, collection) >= _NEAR * _value(best, collection)]
        text = (
            f"{backbone}: of k alone {best['axis']['k']:g} is best ({_said(best, collection)}); "
            + (f"k from {min(near):g} to {max(near):g} stays" if len(near) > 1 else "no other stays")
            + f" within {1 - _NEAR:.0%} of it."
        )
        if grid:
            top = max(grid, key=lambda row: _value(row, collection))
            gain = _value(top, collection) / max(_value(best, collection), 1e-9)
            text += (
                f" With the level lowered too, the best of the map (k {top['axis']['k']:g}, {top['axis']['level']:.2%} of the logits above "
                f"zero, one seed) has {_said(top, collection)}, {gain:.2f} times as much, at {_flops(top, collection):.2f} FLOPS against "
                f"{_flops(best, collection):.2f}."
            )
            if auto is not None:
                text += f" auto has {_said(auto, collection)}, {_value(auto, collection) / max(_value(top, collection), 1e-9):.2f} of the map's best."
        said.append(text)
    return said


def _curves(row: Row, records: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What a row's trainings looked like, step by step: lists by seed."""
    of = [records[hash_] for hash_ in row["cells"]]
    observed = ("query_active_dims", "document_active_dims", "score_std", "document_similarity")
    curves: dict[str, Any] = {
        name: [[[seen["step"], _digits(seen[name])] for seen in record["observations"]] for record in of] for name in observed
    }
    curves["loss"] = [[[seen["step"], _digits(seen["loss"])] for seen in record["observations"]] for record in of]
    curves["gradient_norm"] = [
        [[entry["step"], _digits(entry["grad_norm"])] for entry in record["log"] if "grad_norm" in entry] for record in of
    ]
    return {"backbone": row["backbone"], "key": row["key"], "arm": row["arm"], "curves": curves}


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def _dynamics(rows: Sequence[Row], records: Mapping[str, dict[str, Any]], collection: str) -> list[str]:
    said = []
    for row in rows:
        of = [records[hash_]["observations"] for hash_ in row["cells"]]
        first, last = (statistics.mean(seen[end]["loss"] for seen in of) for end in (0, -1))
        spreads = [statistics.mean(seen[end]["score_std"] for seen in of) for end in (0, -1)]
        alike = statistics.mean(seen[-1]["document_similarity"] for seen in of)
        named = f"; the monitor named: {', '.join(row['findings'])}" if row["findings"] else ""
        said.append(
            f"{row['backbone']}, {row['arm']}: ranking loss {first:.3g} at first, {last:.3g} at last; scores spread by {spreads[0]:.3g} "
            f"and {spreads[1]:.3g}; cosine between documents at the end {alike:.2f}; {METRIC} {_said(row, collection)}{named}."
        )
    return said


# ---------------------------------------------------------------------------------------- controls


# What two arms differ in, the two, and what it says when the first one is better and when it is not.
_PAIRS = [
    ("scale, with the step size that Adam gives it", Arm.FIXED, Arm.RAW, "dividing W and b by k helps as the paper has it",
     "dividing W and b by k does not help"),
    ("scale of the scores alone", Arm.RUNTIME_SCALAR, Arm.RAW, "smaller scores help even at unchanged relative steps",
     "smaller scores alone do not help"),
    ("relative step size alone", Arm.LARGER_STEPS, Arm.UNTIED,
     "larger relative steps of the head help without any scale", "larger relative steps of the head alone do not help"),
    ("relative step size, given the scale", Arm.FIXED, Arm.RUNTIME_SCALAR,
     "of what W/k gives, this part is Adam's k times larger relative steps on W, not the scale",
     "the larger relative steps that W/k takes are not what helps"),
    ("where the scale sits (same function at the start)", Arm.FIXED, Arm.FOLDED,
     "the same function at the start ends better with W/k than with the LayerNorm scaled and the tie kept",
     "W/k is no better than the same scale in the LayerNorm"),
    ("norm of W without the scale", Arm.SMALL_NORM, Arm.RAW,
     "a small norm of W helps although the function at the start is the raw one",
     "a small norm of W by itself does not help: it is not the norm"),
    ("untying alone", Arm.UNTIED, Arm.RAW, "untying helps by itself", "untying by itself does not help"),
    ("tie under W/k", Arm.FIXED, Arm.LEFT_TIED, "leaving the tie loses: the input embeddings shrink too",
     "leaving the tie does no harm here"),
    ("bias", Arm.BIAS_KEPT, Arm.FIXED, "keeping the bias is better than dividing it", "keeping the bias is no better"),
    ("temperature", Arm.TEMPERATURE, Arm.RAW, "a temperature in the loss helps",
     "a temperature in the loss does not do what the scale does"),
    ("temperature against scale", Arm.FIXED, Arm.TEMPERATURE,
     "the scale does more than a temperature of the same spread of scores", "the scale does no more than a temperature"),
    ("level alone", Arm.SHIFT_ALONE, Arm.RAW, "lowering the level helps, at the raw head's norm", "lowering the level alone does not help"),
    ("level against scale", Arm.SHIFT_ALONE, Arm.FIXED, "the level does more than the paper's scale",
     "the level does no more than the paper's scale"),
    ("scale after level", Arm.AUTO, Arm.SHIFT_ALONE, "choosing the scale too adds to the level",
     "choosing the scale adds nothing to the level here"),
    ("level after scale", Arm.AUTO, Arm.SCALE_ALONE, "lowering the level adds to a chosen scale", "lowering the level adds nothing to a scale"),
    ("another backbone's higher norm", Arm.HIGHEST_NORM, Arm.RAW, "a larger norm helps", "a larger norm does not help"),
    ("another backbone's lower norm", Arm.LOWEST_NORM, Arm.RAW, "a smaller norm helps", "a smaller norm does not help"),
]  # fmt: skip


def _controls(rows: Sequence[Row], records: Mapping[str, dict[str, Any]], collection: str) -> list[dict[str, Any]]:
    """Pairs of rows that differ in one thing, and what it says when one is better."""
    found: list[dict[str, Any]] = []
    for backbone, of in _by_backbone(rows).items():
        arms = _by_arm(of)
        for about, one, other, helps, not_helps in _PAIRS:
            if one not in arms or other not in arms:  # it failed, or is not of this backbone
                continue
            a, b = arms[one], arms[other]
            ours, theirs = (_per_query(row, records, collection) for row in (a, b))
            found.append(
                {"backbone": backbone, "about": about, "one": a["arm"], "other": b["arm"], "difference": _value(a, collection) - _value(b, collection),
                 "p": paired_p(theirs, ours), "noise": _noise(a, b, collection), "values": [_said(row, collection) for row in (a, b)],
                 "flops": [_flops(row, collection) for row in (a, b)], "meanings": (helps, not_helps)}
            )  # fmt: skip
    for pair, p in zip(found, holm([pair["p"] for pair in found]), strict=True):
        pair["p_corrected"] = p
        sure = _counts(pair)
        helps, not_helps = pair.pop("meanings")
        meaning = helps if sure and pair["difference"] > 0 else not_helps
        if sure and pair["difference"] < 0:
            meaning += ", rather the reverse" if "not help" in not_helps else ""
        pair["said"] = (
            f"{pair['backbone']}, {pair['about']}: {pair['one']} {pair['values'][0]} against {pair['other']} {pair['values'][1]} "
            f"({pair['difference']:+.3f}, p {p:.2g}; FLOPS {pair['flops'][0]:.2f} and {pair['flops'][1]:.2f}): {meaning}."
        )
    return found
