"""Which k and shift train a head best, and how near calibration comes: many short trainings.

For every backbone: a grid of scale and level, the paper's k alone, neither of them, and ``auto``, for heads inflated by 1/4, 1, 4
and 16. Every training is a cell, kept in --out: an interrupted experiment resumes. The table shows effectiveness over seeds, cost,
and the findings of the monitor.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from anysplade import load_pairs, write_collection
from anysplade._common.files import atomic_folder
from anysplade.data.collections import Collection, load_python_docs
from anysplade.data.pairs import sample_pairs
from anysplade.model.calibration import mean_excess
from anysplade.model.checkpoints import load_masked_lm
from anysplade.model.head import find_head
from anysplade.model.measuring import Probe, measure_logits
from anysplade.study.cells import CellRecord, QueryScores
from anysplade.study.plan import SMALL, Cell
from anysplade.training.monitoring import diagnose
from experiments import NEVER, named, over_seeds, parser, run_all, with_seeds, write_json

SETTINGS: dict[str, Any] = SMALL | {"checkpoint_steps": NEVER}
INFLATIONS = (0.25, 1, 4, 16)
SHARES = (0.01, 0.003, 0.001, 0.0003)  # levels of the grid: shares of the token logits above zero
SCALE_SHARE = 0.003  # share of the highest token logits, whose mean excess over the lowest of them measures the scale
EXCESSES = (0.34, 0.68, 1.35, 2.7, 5.4)  # scales of the grid: that mean excess
PAPER_K = (2, 4, 8, 16)
LEARNING_RATES = (2e-4, 2.4e-3)
WEIGHTS = (1e-3, 1e-2, 3e-2)  # of both regularizers
TARGETS: tuple[dict[str, int], ...] = ({"document_active_dims": 30}, {"query_active_dims": 12, "document_active_dims": 40})
START = ("positive_share", "query_active_dims", "document_active_dims", "flops", "score_std", "document_similarity")
Records = dict[str, CellRecord]


@dataclass(frozen=True)
class Row:
    """One training with several seeds."""

    mode: str
    cells: tuple[Cell, ...]  # by seed
    inflation: float = 1
    changes: tuple[tuple[str, Any], ...] = ()  # options that differ from those of the other rows of the mode

    def records(self, records: Records) -> list[CellRecord]:
        return [records[cell.hash] for cell in self.cells if cell.hash in records]

    def with_seeds(self, count: int) -> "Row":
        return replace(self, cells=tuple(with_seeds(self.cells[0], count)))


@dataclass(frozen=True)
class Plan:
    """The rows of a backbone."""

    grid: list[Row]
    paper: list[Row]
    others: list[Row]  # auto and none for each inflation, a shift for each term, other learning rates
    sparsity: list[Row]  # a target of active dims, and regularizer weights set by hand

    @property
    def rows(self) -> list[Row]:
        return [*self.grid, *self.paper, *self.others, *self.sparsity]


def plan(folder: str, out: Path) -> Plan:
    data = str(out / "collection")
    model, tokenizer = load_masked_lm(folder)
    probe = measure_logits(model, tokenizer, *sample_pairs(load_pairs(data)))

    def row(mode: str, seeds: int = 1, inflation: float = 1, backbone: str = folder, *, k: Any, shift: Any, **changes: Any) -> Row:
        edits = () if inflation == 1 else (("scaled", 1 / inflation),)
        cell = Cell(backbone, data, SETTINGS | {"k": k, "shift": shift} | changes, edits)
        return Row(mode, (cell,), inflation, tuple(changes.items())).with_seeds(seeds)

    auto = {"k": "auto", "shift": "auto"}
    scale = mean_excess(probe.token_logits, SCALE_SHARE)
    grid = [
        row("grid", k=scale / excess, shift=float(np.quantile(probe.token_logits / (scale / excess), 1 - share)))
        for share, excess in product(SHARES, EXCESSES)
    ]
    paper = [row("paper", k=k, shift=0) for k in PAPER_K]
    others = []
    for inflation in INFLATIONS:
        others += [row("auto", 3, inflation, **auto), row("none", 1, inflation, k=1, shift=0)]
    others.append(row("per term", 3, backbone=per_term(folder, probe, out), **auto))
    for rate in LEARNING_RATES:
        others += [row("auto", **auto, learning_rate=rate), row("paper", k=4, shift=0, learning_rate=rate)]
    sparsity = [row("target", 3, **auto, **target) for target in TARGETS]
    for weight in WEIGHTS:
        sparsity.append(row("lambda", 3, **auto, query_regularizer_weight=weight, document_regularizer_weight=weight))
    return Plan(grid, paper, others, sparsity)


def per_term(folder: str, probe: Probe, out: Path) -> str:
    """A checkpoint with a shift for each term, so that all terms have the same 99th percentile over probe tokens."""
    target = out / "backbones" / f"{Path(folder).name}-per-term"
    if not target.exists():
        model, tokenizer = load_masked_lm(folder)
        high = np.quantile(probe.token_logits, 0.99, axis=0)  # (vocabulary,)
        with torch.no_grad():
            for bias in find_head(model).biases:
                bias -= torch.from_numpy(high - high.mean()).to(bias.dtype).reshape(bias.shape)
        with atomic_folder(target) as work:
            model.save_pretrained(work)
            tokenizer.save_pretrained(work)
    return str(target)


def write_data(out: Path) -> None:
    """Write the training pairs, and every second of the first 1,000 queries over 1,000 documents, so that evaluation is fast."""
    whole, pairs = load_python_docs()
    queries = dict(list(whole.queries.items())[::2][:500])
    qrels = {query_id: whole.qrels[query_id] for query_id in queries}
    relevant = {document_id for grades in qrels.values() for document_id in grades}
    others = [id_ for id_ in whole.corpus if id_ not in relevant][: 1000 - len(relevant)]
    corpus = {id_: whole.corpus[id_] for id_ in sorted((*relevant, *others))}
    write_collection(out / "held-out", Collection(whole.name, corpus, queries, qrels))
    write_collection(out / "collection", whole, pairs)


def best(rows: Sequence[Row], records: Records, count: int) -> list[Row]:
    """The rows with the highest RR@10 for the first seed."""
    return sorted(rows, key=lambda row: -scores(records[row.cells[0].hash]).rr)[:count]


# ------------------------------------------------------------------------------------- the summary


def scores(record: CellRecord) -> QueryScores:
    (of_collection,) = record.results.values()
    return of_collection


def spread(records: Sequence[CellRecord]) -> dict[str, Any]:
    """Means over seeds, of the calibration too, and the standard deviation and the values of RR@10."""
    affine = {name: float(np.mean([getattr(record, name) for record in records])) for name in ("k", "shift")}
    return {"runs": len(records)} | affine | over_seeds([named(scores(record)) for record in records], "RR@10")


def summarize(backbone: str, folder: str, planned: Plan, records: Records) -> dict[str, Any]:
    grid, paper = ([spread(row.with_seeds(3).records(records)) for row in rows] for rows in (planned.grid, planned.paper))
    top = max((row for row in grid if row["runs"] == 3), key=lambda row: row["RR@10"])
    rows = [{"mode": "best of the grid", "inflation": 1} | top]
    rows.append({"mode": "paper, best k", "inflation": 1} | max(paper, key=lambda row: (row["runs"], row["RR@10"])))
    for row in planned.others:
        rows.append({"mode": row.mode, "inflation": row.inflation, **dict(row.changes)} | spread(row.records(records)))
    for line in rows:
        line |= {"backbone": backbone, "of best": line["RR@10"] / top["RR@10"]}
        line["dims of best"] = line["document_active_dims"] / top["document_active_dims"]
    vocabulary = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
    return {
        "rows": rows,
        "grid": grid,
        "paper": paper,
        "alarms": alarms([row.with_seeds(3) for row in planned.rows], records, top["RR@10"], vocabulary),
        "start": start([*planned.grid, *planned.paper], records, top["RR@10"]),
        "sparsity": targets(planned.sparsity, records),
    }


def start(rows: Sequence[Row], records: Records, top: float) -> dict[str, Any]:
    """Statistics of the grid's and the paper's cells before the first step, and their Spearman correlation with RR@10."""
    cells = []
    for row in rows:
        record = records[row.cells[0].hash]
        if record.after.start_loss is None:
            raise ValueError("the probe's queries and documents must be pairs")
        cell = {"RR@10, of best": scores(record).rr / top, "loss over guessing": record.after.start_loss / record.after.chance}
        cells.append(cell | {name: getattr(record.after, name) for name in START})
    effectiveness, *_ = columns = {name: [cell[name] for cell in cells] for name in cells[0]}
    correlations = {name: float(spearmanr(columns[effectiveness], columns[name])[0]) for name in columns if name != effectiveness}
    return {"correlations": correlations, "cells": cells}


def alarms(rows: Sequence[Row], records: Records, top: float, vocabulary: int) -> dict[str, Any]:
    """The monitor's findings in runs that ended badly (below 0.25 of the best), well (above 0.8), and between."""
    counts: dict[str, Any] = {name: {"runs": 0, "flagged": 0} for name in ("collapsed", "between", "healthy")}
    wrong = []
    for row, record in [(one, record) for one in rows for record in one.records(records)]:
        value = scores(record).rr / top
        kind = "collapsed" if value < 0.25 else "healthy" if value > 0.8 else "between"
        findings = diagnose(record.observations, vocabulary)
        early = [finding for finding in findings if finding.collapse and finding.step <= SETTINGS["steps"] / 5]
        counts[kind]["runs"] += 1
        counts[kind]["flagged"] += bool(early)
        if (kind == "collapsed" and not early) or (kind == "healthy" and any(finding.collapse for finding in findings)):
            cell = {"mode": row.mode, "inflation": row.inflation, **record.options}
            wrong.append({"cell": cell, "RR@10": scores(record).rr, "findings": [[f.name, f.step] for f in findings]})
    return counts | {"wrong": wrong}


def targets(rows: Sequence[Row], records: Records) -> list[dict[str, Any]]:
    """Compare runs with a target to runs with weights set by hand, at the same document active dims."""
    manual = [spread(row.records(records)) for row in rows if row.mode == "lambda"]
    manual.sort(key=lambda line: line["document_active_dims"])
    costs, ndcg = ([line[name] for line in manual] for name in ("document_active_dims", "nDCG@10"))
    lines = []
    for row in (row for row in rows if row.mode == "target"):
        line = {"target": dict(row.changes)} | spread(row.records(records))
        reached = [record.training_active_dims or (np.nan, np.nan) for record in row.records(records)]
        line["ends over target"] = {
            name: [pair[name == "document_active_dims"] / target for pair in reached] for name, target in row.changes
        }
        line["nDCG@10 by hand at this cost"] = float(np.interp(np.log(line["document_active_dims"]), np.log(costs), ndcg))
        lines.append(line)
    return [*lines, *({"lambda by hand": True} | line for line in manual)]


def show(summary: dict[str, Any]) -> None:
    print("| backbone | head | inflation | k | shift | RR@10 | of best | query / document active dims | FLOPS |")
    print("|---|---|---|---|---|---|---|---|---|")
    for backbone, part in summary.items():
        for row in part["rows"]:
            sd = "" if row["RR@10 sd"] is None else f" ± {row['RR@10 sd']:.3f}"
            affine = f"{row['k']:.3g} | {row['shift']:.3g}"
            dims = f"{row['query_active_dims']:.0f} / {row['document_active_dims']:.0f} | {row['flops']:.1f}"
            rate = f", learning rate {row['learning_rate']:g}" if "learning_rate" in row else ""
            head = f"{backbone} | {row['mode']}{rate} | ×{row['inflation']:g}"
            print(f"| {head} | {affine} | {row['RR@10']:.3f}{sd} | {row['of best']:.2f} | {dims} |")
    for backbone, part in summary.items():
        print(backbone, {name: part["alarms"][name] for name in ("collapsed", "between", "healthy")})
        print("  rank correlations with RR@10:", {name: round(value, 2) for name, value in part["start"]["correlations"].items()})
        for row in part["sparsity"]:
            if "target" in row:
                print(
                    f"  target {row['target']}: over target {row['ends over target']}, nDCG@10 {row['nDCG@10']:.3f}, "
                    f"by hand {row['nDCG@10 by hand at this cost']:.3f}"
                )


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--out", type=Path, required=True, help="folder for cells and what they need")
    arguments.add_argument("--backbones", nargs="+", required=True, metavar="FOLDER")
    options = arguments.parse_args()
    backbones = {Path(folder).name: str(Path(folder).resolve()) for folder in options.backbones}
    if len(backbones) < len(options.backbones):  # their folders are named after them
        arguments.error("two backbones have the same name; rename a folder")
    out = options.out.resolve()
    if not (out / "collection").exists():
        write_data(out)
    plans = {name: plan(folder, out) for name, folder in backbones.items()}

    def run(rows: Sequence[Row]) -> Records:
        return run_all([cell for row in rows for cell in row.cells], (str(out / "held-out"),), out, options.workers)

    records = run([row for planned in plans.values() for row in planned.rows])
    for planned in plans.values():  # the rows that are best with one seed get two more
        records |= run([row.with_seeds(3) for row in (*best(planned.grid, records, 3), *best(planned.paper, records, 1))])
    summary = {name: summarize(name, backbones[name], planned, records) for name, planned in plans.items()}
    show(summary)
    write_json(options.json, {"settings": SETTINGS, "backbones": summary})


if __name__ == "__main__":
    main()
