"""What a study's cells say: means over seeds, tests, and sentences made from the numbers."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from anysplade.cells import COSTS, METRICS
from anysplade.comparison import holm

METRIC = METRICS[0]
_SURE = 0.05  # p below which a difference counts, if it is above the noise of the seeds too
_COLLAPSED = 0.25  # of the backbone's best row, below which a row is said to have collapsed
_NEAR = 0.95  # of the best, above which a row is said to be as good

Row = dict[str, Any]


def summarize(
    name: str, rows: Sequence[Row], records: Mapping[str, dict[str, Any]], collections: Sequence[str], k: float
) -> dict[str, Any]:
    """A study's rows with their means, and what follows from them.

    Args:
        rows: ``backbone``, ``arm``, ``axis`` and ``cells``, the hashes of its records, each.
        k: the paper's.
    """
    made = [_row(row, records, collections) for row in rows]
    summary: dict[str, Any] = {"rows": made}
    first = collections[0]
    if name == "main":
        tests = _tests(made, records, collections)
        summary |= {"tests": tests, "conclusions": _main(made, tests, collections)}
    elif name == "controls":
        pairs = _controls(made, records, first, k)
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
    return summary


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


def _p(a: np.ndarray, b: np.ndarray) -> float:
    """Of a paired t-test over queries, two-sided."""
    return 1.0 if np.allclose(a, b) else float(stats.ttest_rel(a, b).pvalue)


def _noise(a: Row, b: Row, collection: str) -> float:
    """Two standard errors, over seeds, of the difference of two rows' means; 0 of single runs, which do not tell."""
    deviations = [(row["results"][collection][f"{METRIC} sd"] or 0.0, row["runs"]) for row in (a, b)]
    return 2 * math.sqrt(sum(sd**2 / runs for sd, runs in deviations))


def _counts(found: Mapping[str, Any]) -> bool:
    """A difference is above chance over queries, and above the noise of the seeds."""
    return found["p_corrected"] < _SURE and abs(found["difference"]) > found["noise"]


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
        arms = {row["arm"]: row for row in of}
        fixed = [row for row in of if row["arm"] not in ("raw", "auto")]
        for collection in collections:
            others = [arms.get("raw"), max(fixed, key=lambda row: _value(row, collection), default=None)]
            for other in others:
                if other is None or "auto" not in arms:
                    continue
                ours, theirs = (_per_query(row, records, collection) for row in (arms["auto"], other))
                costs = [_flops(row, collection) for row in (arms["auto"], other)]
                tests.append(
                    {
                        "backbone": backbone,
                        "collection": collection,
                        "against": other["arm"],
                        "difference": float((ours - theirs).mean()),
                        "p": _p(ours, theirs),
                        "noise": _noise(arms["auto"], other, collection),
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
        arms = {row["arm"]: row for row in of}
        first = collections[0]
        best = max(_value(row, first) for row in of)
        share = _value(arms["raw"], first) / best if "raw" in arms and best else 1.0
        state = "collapses" if share < _COLLAPSED else "degrades" if share < _NEAR else "trains as well as the best"
        norm = arms["raw"]["before"]["mean_row_norm"] if "raw" in arms else float("nan")
        said.append(
            f"{backbone} (mean row norm {norm:.2f}): the raw head {state}, at {share:.0%} of the backbone's best on {Path(first).name}."
        )
    for test in tests:
        if test["against"] == "raw":
            continue
        sure = _counts(test)
        better = test["difference"] > 0
        cost = test["flops"] / test["flops of the other"] if test["flops of the other"] else float("nan")
        verdict = (
            "auto is better than" if sure and better else "auto is worse than" if sure else "no difference shows between auto and"
        )
        said.append(
            f"{test['backbone']} on {Path(test['collection']).name}: {verdict} the best fixed k ({test['against']}), by {test['difference']:+.3f} "
            f"(p {test['p_corrected']:.2g}), at {cost:.2g} times its FLOPS" + ("." if cost <= 1 else ": a higher cost.")
        )
    return said


# ------------------------------------------------------------------------------------------ others

_STATISTICS = ("mean_row_norm", "positive_share", "document_active_dims", "score_std", "document_similarity", "start_loss")


def _correlations(rows: Sequence[Row], collection: str) -> dict[str, dict[str, float]]:
    """Spearman's, of what is known before the first step with effectiveness, over raw heads and over all."""
    found: dict[str, dict[str, float]] = {}
    for label, of in (("raw heads", [row for row in rows if row["arm"] == "raw"]), ("heads, raw and calibrated", list(rows))):
        if len(of) < 3:
            continue
        values = [_value(row, collection) for row in of]
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
        count = sum(1 for row in rows if label != "raw heads" or row["arm"] == "raw")
        strongest = max(found, key=lambda name: abs(found[name]))
        norm = found.get("mean_row_norm")
        said.append(
            f"Over {count} {label}, {METRIC} on {Path(collection).name} goes with the head's mean row norm at rank correlation "
            + ("that cannot be told" if norm is None else f"{norm:+.2f}")
            + f"; the strongest of what is known before training is {strongest.replace('_', ' ')}, at {found[strongest]:+.2f}."
        )
    raw = sorted((row for row in rows if row["arm"] == "raw"), key=lambda row: row["before"]["mean_row_norm"])
    if len(raw) > 1:
        listed = "; ".join(f"{row['backbone']} {row['before']['mean_row_norm']:.2f}: {_said(row, collection)}" for row in raw)
        said.append(f"Raw heads by norm: {listed}.")
    return said


def _tradeoff(rows: Sequence[Row], collection: str) -> list[str]:
    said = []
    for backbone, of in _by_backbone(rows).items():
        ours = [row for row in of if row["arm"] == "auto"]
        for arm in dict.fromkeys(row["arm"] for row in of if row["arm"] != "auto"):
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
        grid = [row for row in of if "level" in row["axis"]]
        auto = next((row for row in of if row["arm"] == "auto"), None)
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
                text += f" auto has {_said(auto, collection)}, {_value(auto, collection) / _value(top, collection):.2f} of the map's best."
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
    return {"backbone": row["backbone"], "arm": row["arm"], "curves": curves}


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


def _controls(rows: Sequence[Row], records: Mapping[str, dict[str, Any]], collection: str, k: float) -> list[dict[str, Any]]:
    """Pairs of rows that differ in one thing, and what it says when one is better."""
    scaled, fold, runtime = f"k={k:g}", f"1/{k:g} folded into the LayerNorm, tied", f"runtime scalar 1/{k:g}"
    pairs = [
        ("scale, with the step size that Adam gives it", scaled, "raw", "dividing W and b by k helps as the paper has it",
         "dividing W and b by k does not help"),
        ("scale of the scores alone", runtime, "raw", "smaller scores help even at unchanged relative steps",
         "smaller scores alone do not help"),
        ("relative step size alone", f"head's learning rate x{k:g}, not scaled", "untied, not scaled",
         "larger relative steps of the head help without any scale", "larger relative steps of the head alone do not help"),
        ("relative step size, given the scale", scaled, runtime,
         "of what W/k gives, this part is Adam's k times larger relative steps on W, not the scale",
         "the larger relative steps that W/k takes are not what helps"),
        ("where the scale sits (same function at the start)", scaled, fold,
         "the same function at the start ends better with W/k than with the LayerNorm scaled and the tie kept",
         "W/k is no better than the same scale in the LayerNorm"),
        ("norm of W without the scale", f"W/{k:g}, LayerNorm x{k:g}", "raw",
         "a small norm of W helps although the function at the start is the raw one",
         "a small norm of W by itself does not help: it is not the norm"),
        ("untying alone", "untied, not scaled", "raw", "untying helps by itself", "untying by itself does not help"),
        ("tie under W/k", scaled, f"k={k:g}, left tied", "leaving the tie loses: the input embeddings shrink too",
         "leaving the tie does no harm here"),
        ("bias", f"k={k:g}, bias kept", scaled, "keeping the bias is better than dividing it", "keeping the bias is no better"),
        ("temperature", f"temperature for the spread of k={k:g}", "raw", "a temperature in the loss helps",
         "a temperature in the loss does not do what the scale does"),
        ("temperature against scale", scaled, f"temperature for the spread of k={k:g}",
         "the scale does more than a temperature of the same spread of scores", "the scale does no more than a temperature"),
        ("level alone", "shift alone", "raw", "lowering the level helps, at the raw head's norm", "lowering the level alone does not help"),
        ("level against scale", "shift alone", scaled, "the level does more than the paper's scale",
         "the level does no more than the paper's scale"),
        ("scale after level", "auto", "shift alone", "choosing the scale too adds to the level",
         "choosing the scale adds nothing to the level here"),
        ("level after scale", "auto", "scale alone", "lowering the level adds to a chosen scale", "lowering the level adds nothing to a scale"),
        ("another backbone's higher norm", "norm of the highest backbone", "raw", "a larger norm helps", "a larger norm does not help"),
        ("another backbone's lower norm", "norm of the lowest backbone", "raw", "a smaller norm helps", "a smaller norm does not help"),
    ]  # fmt: skip
    found: list[dict[str, Any]] = []
    for backbone, of in _by_backbone(rows).items():
        arms = {row["arm"]: row for row in of}
        for about, one, other, helps, not_helps in pairs:
            if one not in arms or other not in arms:
                continue
            a, b = arms[one], arms[other]
            ours, theirs = (_per_query(row, records, collection) for row in (a, b))
            found.append(
                {"backbone": backbone, "about": about, "one": one, "other": other, "difference": _value(a, collection) - _value(b, collection),
                 "p": _p(ours, theirs), "noise": _noise(a, b, collection), "values": [_said(row, collection) for row in (a, b)],
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
