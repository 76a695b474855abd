"""A study's JSON as one HTML file, Markdown and SVG figures. Nothing is computed here."""

import io
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from anysplade._common.files import write_whole
from anysplade.study.arms import Arm

METRIC = "nDCG@10"
_INK = "#010203"  # stands for the text's colour, whatever that is where the figure is shown
_COLORS = {Arm.RAW: "#d1495b", Arm.AUTO: "#2a9d8f"}
_OTHERS = ("#e9a23b", "#7b6fd0", "#4c8bd6", "#9a9a9a")
_MARKERS = {Arm.RAW: "s", Arm.AUTO: "o"}

TITLES = {
    "norm": "Head norm against effectiveness",
    "tradeoff": "Effectiveness against sparsity",
    "dynamics": "How training goes",
    "sensitivity": "How much k and the level matter",
    "controls": "What it is about the scale",
    "main": "All backbones, all collections",
}
ABOUTS = {
    "norm": "Does a large norm of the MLM head tell that training will go wrong? The paper's figure 1, with calibrated heads beside "
    "the raw ones and other statistics beside the norm.",
    "tradeoff": "The regularizers' weights times 1, 10 and 100: what each head gives for the products it costs. The paper's figure 2.",
    "dynamics": "Loss, active dims, gradient norm and spread of the scores over the steps; bands are from the lowest to the highest "
    "seed. The paper's figures 3 and 4.",
    "sensitivity": "k over powers of two with the level left alone (bars: standard deviation over seeds); and the map of k and level, "
    "where the level is the share of token logits above zero at the start.",
    "controls": "Heads that differ in one thing each. Two rows that start as the same function and end apart, or that differ in the "
    "norm alone, tell what the scale does and what it does not.",
    "main": "Raw heads, fixed k and auto (scale and level from probe texts): mean ± standard deviation over seeds, cost beside it. "
    "Tests are paired over queries, on means over seeds, corrected by Holm.",
}


def write_report(study: dict[str, Any], out: Path) -> None:
    """``report.html``, ``report.md`` and ``figures/*.svg`` of a ``study.json``'s content."""
    import matplotlib

    inked: Any = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)
    with matplotlib.rc_context(inked | {"svg.hashsalt": "anysplade", "svg.fonttype": "none"}):
        parts = [_part(name, summary, study) for name, summary in study["studies"].items()]
    content = {
        "title": "Calibrating the MLM head for learned sparse retrieval",
        "about": "Mean ± standard deviation over seeds. FLOPS are expected products a pair of query and document; active dims are terms "
        "with a weight. p is of a paired test over queries, corrected by Holm; a difference counts where p is below 0.05 and it is above "
        "two standard errors over seeds. raw is the backbone's head as it is, k divides it (arXiv 2606.18811), auto chooses scale and level from texts.",
        "studies": parts,
        "entries": _entries(study),
        "metric": METRIC,
    }
    environment = Environment(loader=PackageLoader("anysplade.study"), autoescape=select_autoescape(["html"]), trim_blocks=False)
    for template, name in (("study.html", "report.html"), ("study.md", "report.md")):
        write_whole(out / name, environment.get_template(template).render(content) + "\n")
    for part in parts:
        for figure in part["figures"]:
            write_whole(out / "figures" / f"{figure['name']}.svg", figure["file"])


def _part(name: str, summary: dict[str, Any], study: dict[str, Any]) -> dict[str, Any]:
    collections = summary["settings"]["collections"]
    first = collections[0]
    draw: dict[str, Callable[[], list[tuple[str, str, Any]]]] = {
        "norm": lambda: _norm_figures(summary["rows"], first),
        "tradeoff": lambda: _tradeoff_figures(summary["rows"], first),
        "dynamics": lambda: _dynamics_figures(summary["curves"]),
        "sensitivity": lambda: _sensitivity_figures(summary["rows"], first),
        "controls": lambda: _controls_figures(summary["rows"], first),
        "main": lambda: _main_figures(summary["rows"], collections, study["bm25"]),
    }
    figures = []
    for number, (what, caption, figure) in enumerate(draw[name](), 1):
        key = f"{name}-{number}-{re.sub(r'[^a-z0-9]+', '-', what.lower()).strip('-')}"
        file = _svg(figure)
        figures.append({"name": key, "caption": caption, "svg": _inline(file, key, caption), "file": file.replace(_INK, "#555555")})
    return {
        "name": name,
        "title": TITLES[name],
        "about": ABOUTS[name],
        "settings": _settings(summary["settings"]),
        "made": _made(summary["provenance"]),
        "figures": figures,
        "tables": _tables(summary, study),
        "conclusions": summary["conclusions"],
    }


def _settings(settings: dict[str, Any]) -> str:
    names, collections = (", ".join(Path(name).name for name in settings[key]) for key in ("backbones", "collections"))
    options = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings["training"].items())
    return f"{names}; trained on {Path(settings['data']).name}, evaluated on {collections}; {settings['seeds']} seeds. {options}."


def _made(provenance: dict[str, Any]) -> str:
    hardware = provenance["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    machine = f"{hardware['machine']}, {hardware['cpus']} cores, {', '.join(hardware['gpus']) or 'no GPU'}"
    return f"{provenance['command']} (commit {(provenance['commit'] or 'unknown')[:12]}; {machine}; {versions})"


# ----------------------------------------------------------------------------------------- tables


def _tables(summary: dict[str, Any], study: dict[str, Any]) -> list[dict[str, Any]]:
    tables = []
    collections = summary["settings"]["collections"]
    for collection in collections if "tests" in summary else collections[:1]:
        rows: list[dict[str, Any]] = [
            {
                "cells": [
                    row["backbone"],
                    row["arm"] + _axis(row),
                    str(row["runs"]),
                    f"{row['k']:.3g}",
                    f"{row['shift']:.3g}",
                    *_numbers(row["results"][collection]),
                    ", ".join(row["findings"]) or "–",
                ],
                "link": _entry_id(row),
            }
            for row in summary["rows"]
        ]
        if "tests" in summary:
            bm25 = study["bm25"][collection]
            measures = [f"{bm25[name]:.3f}" for name in (METRIC, "RR@10", "R@100")]
            rows.append({"cells": ["BM25", "", "", "", "", *measures, *["–"] * 4], "link": None})
        names = [
            "backbone",
            "head",
            "runs",
            "k",
            "shift",
            METRIC,
            "RR@10",
            "R@100",
            "query dims",
            "document dims",
            "FLOPS",
            "monitor",
        ]
        tables.append({"title": Path(collection).name, "names": names, "rows": rows, "texts": 2})
    if "tests" in summary:
        rows = [
            {
                "cells": [t["backbone"], Path(t["collection"]).name, t["against"], f"{t['difference']:+.3f} ± {t['noise'] / 2:.3f}",
                          f"{t['p_corrected']:.2g}",
                          f"{t['flops']:.2f}", f"{t['flops of the other']:.2f}"],
                "link": None,
            }
            for t in summary["tests"]
        ]  # fmt: skip
        names = ["backbone", "collection", "auto against", METRIC, "p", "FLOPS of auto", "of the other"]
        tables.append({"title": "Tests", "names": names, "rows": rows, "texts": 3})
    return tables


def _axis(row: dict[str, Any]) -> str:
    return f", weight {row['axis']['weight']:g}" if "weight" in row["axis"] else ""


def _numbers(found: dict[str, Any]) -> list[str]:
    def with_sd(name: str) -> str:
        sd = found[f"{name} sd"]
        return f"{found[name]:.3f}" + (f" ± {sd:.3f}" if sd is not None else "")

    costs = [f"{found[name]:,.0f}" for name in ("query_active_dims", "document_active_dims")]
    return [with_sd(METRIC), with_sd("RR@10"), with_sd("R@100"), *costs, f"{found['flops']:.2f}"]


def _entry_id(row: dict[str, Any]) -> str:
    return f"row-{row['cells'][0]}-{row['runs']}"


def _entries(study: dict[str, Any]) -> list[dict[str, Any]]:
    """One for each row of any study, with its cells."""
    made: dict[str, dict[str, Any]] = {}
    for summary in study["studies"].values():
        for row in summary["rows"]:
            cells = []
            for hash_ in row["cells"]:
                cell = study["cells"][hash_]
                values = [f"{found[METRIC]:.4f}" for found in cell["results"].values()]
                cells.append(
                    {"hash": hash_, "seed": cell["seed"], "found": values, "k": f"{cell['k']:.4g}", "shift": f"{cell['shift']:.4g}",
                     "seconds": f"{cell['seconds']:.0f}", "commit": (cell["commit"] or "unknown")[:12]}
                )  # fmt: skip
            first = study["cells"][row["cells"][0]]
            made.setdefault(
                _entry_id(row),
                {
                    "id": _entry_id(row),
                    "backbone": row["backbone"],
                    "arm": row["arm"] + _axis(row),
                    "collections": [Path(name).name for name in first["results"]],
                    "cells": cells,
                    "commands": [*first["commands"], *(study["cells"][h]["commands"][-1] for h in row["cells"][1:])],
                },
            )
    return list(made.values())


# ---------------------------------------------------------------------------------------- figures

Drawn = list[tuple[str, str, Any]]  # what it is of, caption, figure


def _axes(x: str, y: str, height: float = 3.2) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, height), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def _arms(rows: Sequence[dict[str, Any]]) -> dict[str, Arm]:
    """Keys by label, in the order of the rows."""
    return {row["arm"]: Arm(row["key"]) for row in rows}


def _color(arm: str, arms: dict[str, Arm]) -> str:
    others = [name for name, key in arms.items() if key not in _COLORS]
    return _COLORS.get(arms[arm]) or _OTHERS[others.index(arm) % len(_OTHERS)]


def _backbones(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    names = dict.fromkeys(row["backbone"] for row in rows)
    return [(name, [row for row in rows if row["backbone"] == name]) for name in names]


def _norm_figures(rows: Sequence[dict[str, Any]], collection: str) -> Drawn:
    figure, axes = _axes("mean row norm of the decoder, as trained", METRIC)
    arms = _arms(rows)
    for arm in arms:
        of = [row for row in rows if row["arm"] == arm]
        norms = [row["after"]["mean_row_norm"] for row in of]
        found = [row["results"][collection] for row in of]
        axes.errorbar(
            norms, [f[METRIC] for f in found], [f[f"{METRIC} sd"] or 0 for f in found], fmt=_MARKERS.get(arms[arm], "^"),
            color=_color(arm, arms), capsize=3, label=arm,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.15), ncols=3, frameon=False)
    raw = sorted((row for row in rows if row["key"] == Arm.RAW), key=lambda row: row["after"]["mean_row_norm"])
    caption = (
        f"{METRIC} on {Path(collection).name} against the norm of the head that training started from. Raw heads from left to "
        f"right: {', '.join(row['backbone'] for row in raw)}."
    )
    return [("norm", caption, figure)]


def _tradeoff_figures(rows: Sequence[dict[str, Any]], collection: str) -> Drawn:
    drawn = []
    for backbone, of in _backbones(rows):
        figure, axes = _axes("FLOPS", METRIC)
        arms = _arms(of)
        for arm in arms:
            found = sorted((row["results"][collection] for row in of if row["arm"] == arm), key=lambda f: f["flops"])
            axes.errorbar(
                [f["flops"] for f in found], [f[METRIC] for f in found], [f[f"{METRIC} sd"] or 0 for f in found],
                fmt=f"{_MARKERS.get(arms[arm], '^')}-", color=_color(arm, arms), capsize=3, label=arm,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.15), ncols=3, frameon=False)
        drawn.append(
            (backbone, f"{backbone}: one point for each weight of the regularizers; bars are standard deviations.", figure)
        )
    return drawn


_QUANTITIES = {
    "loss": "ranking loss",
    "document_active_dims": "active dims a document",
    "gradient_norm": "gradient norm",
    "score_std": "spread of the scores",
}


def _dynamics_figures(curves: Sequence[dict[str, Any]]) -> Drawn:
    drawn = []
    for backbone, of in _backbones(curves):
        arms = _arms(of)
        for name, label in _QUANTITIES.items():
            figure, axes = _axes("step", label)
            for part in of:
                seeds = part["curves"][name]
                steps = [point[0] for point in seeds[0]]
                columns = list(zip(*([max(point[1], 1e-3) for point in seed[: len(steps)]] for seed in seeds), strict=True))
                color = _color(part["arm"], arms)
                axes.plot(steps[: len(columns)], [sum(c) / len(c) for c in columns], color=color, label=part["arm"])
                axes.fill_between(
                    steps[: len(columns)], [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.2, linewidth=0
                )
            axes.set_yscale("log")
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.15), ncols=3, frameon=False)
            drawn.append((f"{backbone} {name}", f"{backbone}: {label}.", figure))
    return drawn


def _sensitivity_figures(rows: Sequence[dict[str, Any]], collection: str) -> Drawn:
    drawn = []
    for backbone, of in _backbones(rows):
        line = [row for row in of if row["axis"].keys() == {"k"}]
        figure, axes = _axes("k", METRIC)
        found = [row["results"][collection] for row in line]
        ks, means, sds = [row["axis"]["k"] for row in line], [f[METRIC] for f in found], [f[f"{METRIC} sd"] or 0 for f in found]
        axes.errorbar(ks, means, sds, fmt="^-", color=_OTHERS[0], capsize=3, label="k alone")
        axes.fill_between(
            ks, [m - s for m, s in zip(means, sds, strict=True)], [m + s for m, s in zip(means, sds, strict=True)],
            color=_OTHERS[0], alpha=0.2, linewidth=0,
        )  # fmt: skip
        for row in of:
            if row["key"] == Arm.AUTO:
                axes.axhline(row["results"][collection][METRIC], color=_COLORS[Arm.AUTO], linestyle="--", label=row["arm"])
        axes.set_xscale("log", base=2)
        axes.set_xticks(ks, [f"{k:g}" for k in ks])
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.15), ncols=2, frameon=False)
        drawn.append((f"{backbone} k", f"{backbone}: k alone, the level left as it is; auto for comparison.", figure))

        grid = {(row["axis"]["k"], row["axis"]["level"]): row["results"][collection] for row in of if row["key"] == Arm.LEVEL}
        if not grid:
            continue
        columns, levels = sorted({k for k, _ in grid}), sorted({level for _, level in grid}, reverse=True)
        figure, axes = _axes("k", "token logits above zero")
        axes.grid(visible=False)
        values = [[grid[k, level][METRIC] if (k, level) in grid else float("nan") for k in columns] for level in levels]
        axes.pcolormesh(values, cmap="viridis", vmin=0)
        highest = max(f[METRIC] for f in grid.values())
        for (i, level), (j, k) in itertools.product(enumerate(levels), enumerate(columns)):
            if (k, level) not in grid:  # it failed
                continue
            f = grid[k, level]
            axes.text(
                j + 0.5, i + 0.5, f"{f[METRIC]:.3f}\n{f['flops']:.1f}", ha="center", va="center", fontsize=9,
                color="black" if f[METRIC] > 0.6 * highest else "white",
            )  # fmt: skip
        axes.set_xticks([j + 0.5 for j in range(len(columns))], [f"{k:g}" for k in columns])
        axes.set_yticks([i + 0.5 for i in range(len(levels))], [f"{level:.2%}" for level in levels])
        axes.invert_yaxis()
        drawn.append((f"{backbone} map", f"{backbone}: {METRIC}, and FLOPS below it, for k and level; one seed.", figure))
    return drawn


def _controls_figures(rows: Sequence[dict[str, Any]], collection: str) -> Drawn:
    drawn = []
    for backbone, of in _backbones(rows):
        figure, axes = _axes(METRIC, "", height=0.5 + 0.4 * len(of))
        for i, row in enumerate(of):
            found = row["results"][collection]
            color = _COLORS.get(row["key"], _OTHERS[2])
            axes.barh(i + 0.18, found[METRIC], 0.36, xerr=found[f"{METRIC} sd"] or 0, color=color, capsize=3, ecolor=_INK)
            axes.text(0, i - 0.04, row["arm"], va="bottom", ha="left", fontsize=9)
        axes.set_ylim(len(of) - 0.5, -0.6)
        axes.set_yticks([])
        axes.set_xlim(left=0)
        axes.spines["left"].set_visible(False)
        drawn.append(
            (backbone, f"{backbone}: {METRIC} on {Path(collection).name}; bars are standard deviations over seeds.", figure)
        )
    return drawn


def _main_figures(rows: Sequence[dict[str, Any]], collections: Sequence[str], bm25: dict[str, Any]) -> Drawn:
    drawn = []
    arms = _arms(rows)
    named = {row["arm"]: row for row in reversed(rows)}  # the first of each has its name in the legend
    groups = _backbones(rows)
    for collection in collections:
        figure, axes = _axes(METRIC, "", height=1.0 + 0.75 * len(groups))
        for i, (backbone, of) in enumerate(groups):
            axes.text(0, i - 0.3, backbone, va="bottom", ha="left", fontsize=9)
            for row in of:
                found = row["results"][collection]
                y = i - 0.2 + 0.55 * list(arms).index(row["arm"]) / max(1, len(arms) - 1)
                axes.errorbar(
                    found[METRIC], y, xerr=found[f"{METRIC} sd"] or 0, fmt=_MARKERS.get(row["key"], "^"), color=_color(row["arm"], arms),
                    capsize=3, label=row["arm"] if row is named[row["arm"]] else None,
                )  # fmt: skip
        axes.axvline(bm25[collection][METRIC], color=_INK, linestyle=":", label="BM25")
        axes.set_ylim(len(groups) - 0.4, -0.6)
        axes.set_yticks([])
        axes.set_xlim(left=0)
        axes.spines["left"].set_visible(False)
        figure.legend(loc="outside upper center", ncols=3, frameon=False)
        drawn.append((Path(collection).name, f"{Path(collection).name}: mean and standard deviation over seeds.", figure))
    return drawn


def _svg(figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Type", "Format")), transparent=True)
    return out.getvalue()


def _inline(svg: str, key: str, caption: str) -> str:
    """An SVG file as a part of an HTML page: ids of its own, no namespaces, the page's colour of text."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:xmlns(?::\w+)?|version|width|height)="[^"]*"(?=[^<]*viewBox)', "", svg, count=8)
    svg = re.sub(r'(viewBox="[^"]*")[^>]*>', r"\1>", svg, count=1)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", svg)
    label = caption.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}" stroke-linejoin="round"', 1)
    return svg.replace(_INK, "currentColor")
