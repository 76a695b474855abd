"""The figures of a study."""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from anysplade._common.figures import INK, ON_A_PAGE, draw
from anysplade.study.arms import Arm
from anysplade.study.cells import METRIC
from anysplade.study.results import Baseline, Means, RowCurves, RowResult, Study, StudyResult, by_backbone

_COLORS = {Arm.RAW: "#d1495b", Arm.AUTO: "#2a9d8f"}
_OTHERS = ("#e9a23b", "#7b6fd0", "#4c8bd6", "#9a9a9a")
_MARKERS = {Arm.RAW: "s", Arm.AUTO: "o"}
_WIDTH, _HEIGHT = 4.4, 3.2  # inches
_LEGEND: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 1.15)}
_STYLE = ON_A_PAGE | {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.25,
    "legend.frameon": False,
}  # fmt: skip
_QUANTITIES = {
    "loss": "ranking loss",
    "document_active_dims": "active dims per document",
    "gradient_norm": "gradient norm",
    "score_std": "spread of the scores",
}


@dataclass(frozen=True)
class Figure:
    """An SVG image, with text and axes in the colour ``INK``."""

    name: str  # of the file, unique within a report
    caption: str
    svg: str


Sketch = tuple[str, str, float, Callable[[Any], None]]  # subject, caption, height in inches, function that draws on a figure


def study_figures(name: str, result: StudyResult) -> list[Figure]:
    """Draw the figures of a study."""
    study = result.studies[name]
    collections, groups = study.settings.collections, by_backbone(study.rows)
    first = collections[0]
    sketches = {
        "norm": lambda: [_norm(study.rows, first)],
        "tradeoff": lambda: [_tradeoff(*group, first) for group in groups],
        "dynamics": lambda: _dynamics(study.curves or ()),
        "sensitivity": lambda: [sketch for group in groups for sketch in _sensitivity(*group, first)],
        "controls": lambda: [_controls(*group, first) for group in groups],
        **dict.fromkeys(("main", "folding"), lambda: [_main(study, place, result.bm25[place]) for place in collections]),
    }[name]()
    figures = []
    for number, (subject, caption, height, paint) in enumerate(sketches, 1):
        slug = re.sub(r"[^a-z0-9]+", "-", subject.lower()).strip("-")
        figures.append(Figure(f"{name}-{number}-{slug}", caption, draw(paint, _WIDTH, height, _STYLE)))
    return figures


def _colors(rows: Sequence[RowResult] | Sequence[RowCurves]) -> dict[str, str]:
    """The colour of each arm by label, in the order of the rows."""
    others = itertools.cycle(_OTHERS)
    return {arm: _COLORS.get(key) or next(others) for arm, key in {row.arm: row.key for row in rows}.items()}


def _means(points: Sequence[Means]) -> tuple[np.ndarray, np.ndarray]:
    """The means, and the standard deviations: NaN, which is not drawn, for single trainings."""
    return np.array([point.ndcg for point in points]), np.array([point.ndcg_sd for point in points], float)


def _paint_points(
    rows: Sequence[RowResult], collection: str, label: str, x: Callable[[RowResult], float], line: str, figure: Any
) -> None:
    """Effectiveness of each arm against a quantity ``x`` on a logarithmic axis; ``line`` is matplotlib's style of a line or ""."""
    axes = figure.add_subplot(xlabel=label, ylabel=METRIC, xscale="log")
    for arm, color in _colors(rows).items():
        group = [row for row in rows if row.arm == arm]
        if line:
            group.sort(key=x)
        marker = _MARKERS.get(group[0].key, "^") + line
        means, sds = _means([row.results[collection] for row in group])
        axes.errorbar([x(row) for row in group], means, sds, fmt=marker, color=color, capsize=3, label=arm)
    axes.set_ylim(bottom=0)
    axes.legend(**_LEGEND, ncols=3)


def _norm(rows: Sequence[RowResult], collection: str) -> Sketch:
    label = "mean row norm of the decoder, as trained"
    raw = sorted((row for row in rows if row.key == Arm.RAW), key=lambda row: row.after.mean_row_norm)
    caption = (
        f"{METRIC} on {Path(collection).name} against the norm of the head that training started from. Raw heads from left to "
        f"right: {', '.join(row.backbone for row in raw)}."
    )
    return "norm", caption, _HEIGHT, partial(_paint_points, rows, collection, label, lambda row: row.after.mean_row_norm, "")


def _tradeoff(backbone: str, rows: Sequence[RowResult], collection: str) -> Sketch:
    caption = f"{backbone}: one point for each weight of the regularizers; bars are standard deviations."
    paint = partial(_paint_points, rows, collection, "FLOPS", lambda row: row.results[collection].flops, "-")
    return backbone, caption, _HEIGHT, paint


def _dynamics(rows: Sequence[RowCurves]) -> list[Sketch]:
    return [
        (f"{backbone} {name}", f"{backbone}: {label}.", _HEIGHT, partial(_paint_curves, group, name, label))
        for backbone, group in by_backbone(rows)
        for name, label in _QUANTITIES.items()
    ]


def _paint_curves(rows: Sequence[RowCurves], name: str, label: str, figure: Any) -> None:
    axes = figure.add_subplot(xlabel="step", ylabel=label, yscale="log")
    colors = _colors(rows)
    for row in rows:
        seeds = getattr(row.curves, name)
        steps = [step for step, _ in seeds[0]]
        values = np.maximum([[value for _, value in seed[: len(steps)]] for seed in seeds], 1e-3)  # (seeds, steps)
        axes.plot(steps, values.mean(axis=0), color=colors[row.arm], label=row.arm)
        axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colors[row.arm], alpha=0.2, linewidth=0)
    axes.legend(**_LEGEND, ncols=3)


def _sensitivity(backbone: str, rows: Sequence[RowResult], collection: str) -> list[Sketch]:
    grid = {(row.axis.k, row.axis.level): row.results[collection] for row in rows if row.key == Arm.LEVEL}
    line = (f"{backbone} k", f"{backbone}: k alone, the level left as it is; auto for comparison.")
    sketches: list[Sketch] = [(*line, _HEIGHT, partial(_paint_k, rows, collection))]
    if grid:
        caption = f"{backbone}: {METRIC}, and FLOPS below it, for k and level; one seed."
        sketches.append((f"{backbone} map", caption, _HEIGHT, partial(_paint_map, grid)))
    return sketches


def _paint_k(rows: Sequence[RowResult], collection: str, figure: Any) -> None:
    axes = figure.add_subplot(xlabel="k", ylabel=METRIC)
    points = {row.axis.k: row.results[collection] for row in rows if row.axis.k and not row.axis.level}
    means, sds = _means(list(points.values()))
    axes.errorbar(list(points), means, sds, fmt="^-", color=_OTHERS[0], capsize=3, label="k alone")
    axes.fill_between(list(points), means - sds, means + sds, color=_OTHERS[0], alpha=0.2, linewidth=0)
    for row in rows:
        if row.key == Arm.AUTO:
            axes.axhline(row.results[collection].ndcg, color=_COLORS[Arm.AUTO], linestyle="--", label=row.arm)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(points), [f"{k:g}" for k in points])
    axes.set_ylim(bottom=0)
    axes.legend(**_LEGEND, ncols=2)


def _paint_map(grid: Mapping[tuple[Any, Any], Means], figure: Any) -> None:
    axes = figure.add_subplot(xlabel="k", ylabel="token logits above zero")
    axes.grid(visible=False)
    ks, levels = sorted({k for k, _ in grid}), sorted({level for _, level in grid}, reverse=True)
    values = [[grid[k, level].ndcg if (k, level) in grid else float("nan") for k in ks] for level in levels]
    axes.pcolormesh(values, cmap="viridis", vmin=0)
    highest = max(means.ndcg for means in grid.values())
    for (i, level), (j, k) in itertools.product(enumerate(levels), enumerate(ks)):
        if means := grid.get((k, level)):  # otherwise the training failed
            color = "black" if means.ndcg > 0.6 * highest else "white"
            text = f"{means.ndcg:.3f}\n{means.flops:.1f}"
            axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=9, color=color)
    axes.set_xticks([j + 0.5 for j in range(len(ks))], [f"{k:g}" for k in ks])
    axes.set_yticks([i + 0.5 for i in range(len(levels))], [f"{level:.2%}" for level in levels])
    axes.invert_yaxis()


def _without_y(axes: Any, lowest: float) -> None:
    """Let y run from top to bottom and hide its axis; the rows are named within the figure."""
    axes.set_ylim(lowest, -0.6)
    axes.set_yticks([])
    axes.set_xlim(left=0)
    axes.spines["left"].set_visible(False)


def _controls(backbone: str, rows: Sequence[RowResult], collection: str) -> Sketch:
    def paint(figure: Any) -> None:
        axes = figure.add_subplot(xlabel=METRIC)
        for i, row in enumerate(rows):
            means = row.results[collection]
            color = _COLORS.get(row.key, _OTHERS[2])
            axes.barh(i + 0.18, means.ndcg, 0.36, xerr=means.ndcg_sd, color=color, capsize=3, ecolor=INK)
            axes.text(0, i - 0.04, row.arm, va="bottom", ha="left", fontsize=9)
        _without_y(axes, len(rows) - 0.5)

    caption = f"{backbone}: {METRIC} on {Path(collection).name}; bars are standard deviations over seeds."
    return backbone, caption, 0.5 + 0.4 * len(rows), paint


def _main(study: Study, collection: str, bm25: Baseline) -> Sketch:
    colors = _colors(study.rows)
    named = {row.arm: row for row in reversed(study.rows)}  # the first row of each arm is in the legend
    groups = by_backbone(study.rows)

    def paint(figure: Any) -> None:
        axes = figure.add_subplot(xlabel=METRIC)
        for i, (backbone, rows) in enumerate(groups):
            axes.text(0, i - 0.3, backbone, va="bottom", ha="left", fontsize=9)
            for row in rows:
                means = row.results[collection]
                y = i - 0.2 + 0.55 * list(colors).index(row.arm) / max(1, len(colors) - 1)
                style = {"fmt": _MARKERS.get(row.key, "^"), "color": colors[row.arm], "capsize": 3}
                label = row.arm if row is named[row.arm] else None
                axes.errorbar(means.ndcg, y, xerr=means.ndcg_sd, **style, label=label)
        axes.axvline(bm25.ndcg, color=INK, linestyle=":", label="BM25")
        _without_y(axes, len(groups) - 0.4)
        figure.legend(loc="outside upper center", ncols=3, frameon=False)

    subject = Path(collection).name
    return subject, f"{subject}: mean and standard deviation over seeds.", 1.0 + 0.75 * len(groups), paint
