"""Which k and shift train a head best, and how near calibration comes: many short runs, restartable.

For every backbone: a grid of scale and level, the paper's k alone, nothing at all, and ``auto``, for heads
inflated by 1/4, 1, 4 and 16. Every run is a cell with a file of its own in --out; what is there is not run
again. The table is made from the cells: effectiveness over seeds, cost, and what the monitor said.
"""

import argparse
import hashlib
import json
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from tqdm import tqdm

from anysplade import TrainingConfig, evaluate, load_collection, load_pairs, rescale_head, train, write_collection
from anysplade._common.files import whole_folder, write_whole
from anysplade._common.provenance import provenance
from anysplade.data.collections import Collection, load_python_docs
from anysplade.errors import OutputError
from anysplade.model.calibration import ACTIVE_SHARE, MEAN_EXCESS, mean_excess, sample_pairs
from anysplade.model.head import RECORD, find_head, load_masked_lm, measure_logits, summarize_probe
from anysplade.study.plan import SMALL
from anysplade.training.monitoring import Observation, diagnose

SETTINGS: dict[str, Any] = SMALL | {"checkpoint_steps": 10**6}
INFLATIONS = (0.25, 1, 4, 16)
SHARES = (0.01, 0.003, 0.001, 0.0003)  # of the token logits above zero: the grid's levels
SCALE_SHARE = 0.003  # of the token logits, whose mean excess over the lowest of them is a grid cell's scale
EXCESSES = (0.34, 0.68, 1.35, 2.7, 5.4)  # of the highest 0.3 % on average: the grid's scales
PAPER_K = (2, 4, 8, 16)
METRICS = ("RR@10", "nDCG@10")
Cell = dict[str, Any]
# With the rule that "auto" was, so that a new one is run anew.
AUTO: Cell = {"k": "auto", "shift": "auto", "rule": {"share": ACTIVE_SHARE, "excess": MEAN_EXCESS}}
START = ("positive_share", "query_active_dims", "document_active_dims", "flops", "score_std", "document_similarity")


# ---------------------------------------------------------------------------------------- one cell


def cell_file(out: Path, cell: Cell) -> Path:
    return out / "cells" / f"{hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:16]}.json"


@cache
def _collection(out: Path) -> Collection:
    """Every second query, 500 of them, over 1,000 documents: half of a run's time would be evaluation otherwise."""
    whole = load_collection(out / "collection")
    queries = dict(list(whole.queries.items())[::2][:500])
    qrels = {query_id: whole.qrels[query_id] for query_id in queries}
    relevant = {document_id for grades in qrels.values() for document_id in grades}
    others = [id_ for id_ in whole.corpus if id_ not in relevant][: 1000 - len(relevant)]
    corpus = {id_: whole.corpus[id_] for id_ in (*relevant, *others)}
    return Collection(whole.name, dict(sorted(corpus.items())), queries, qrels)


@cache
def _probe(folder: str, out: Path) -> Any:
    model, tokenizer = load_masked_lm(folder)
    return measure_logits(model, tokenizer, *sample_pairs(load_pairs(out / "collection")))


def inflated(folder: str, inflation: float, out: Path) -> str:
    """A checkpoint whose logits are so many times larger; the backbone itself for 1."""
    if inflation == 1:
        return folder
    target = out / "backbones" / f"{Path(folder).name}-x{inflation:g}"
    if not target.exists():
        model, tokenizer = load_masked_lm(folder)
        rescale_head(model, k=1 / inflation)
        delattr(model.config, RECORD)
        _save(model, tokenizer, target)
    return str(target)


def per_term(folder: str, out: Path) -> str:
    """A checkpoint whose terms all have the same 99th percentile over probe tokens: a shift of each term's own."""
    target = out / "backbones" / f"{Path(folder).name}-per-term"
    if not target.exists():
        model, tokenizer = load_masked_lm(folder)
        high = np.quantile(_probe(folder, out).token_logits, 0.99, axis=0)  # (vocabulary,)
        with torch.no_grad():
            for bias in find_head(model).biases:
                bias -= torch.from_numpy(high - high.mean()).to(bias.dtype).reshape(bias.shape)
        _save(model, tokenizer, target)
    return str(target)


def _save(model: Any, tokenizer: Any, target: Path) -> None:
    try:
        with whole_folder(target) as work:
            model.save_pretrained(work)
            tokenizer.save_pretrained(work)
    except (OSError, OutputError):
        if not target.exists():  # otherwise another worker was first
            raise


def affine(cell: Cell, folder: str, out: Path) -> tuple[Any, Any]:
    """k and shift of a cell; of the grid's, by the level and the scale they give."""
    if "share" not in cell:
        return cell["k"], cell["shift"]
    probe = _probe(folder, out)
    k = mean_excess(probe.token_logits, SCALE_SHARE) / cell["excess"]
    return k, float(np.quantile(probe.token_logits / k, 1 - cell["share"]))


def run_cell(cell: Cell, out: Path) -> Path:
    """Train and evaluate one cell; its file appears when both are done."""
    torch.set_num_threads(1)
    target = cell_file(out, cell)
    if target.exists():
        return target
    folder = per_term(cell["folder"], out) if cell["mode"] == "per term" else inflated(cell["folder"], cell["inflation"], out)
    k, shift = affine(cell, folder, out)
    options = SETTINGS | {"seed": cell["seed"]} | cell.get("options", {})
    with tempfile.TemporaryDirectory(dir=out) as work:
        config = TrainingConfig(backbone=folder, data=str(out / "collection"), output=f"{work}/run", k=k, shift=shift, **options)
        trained = train(config)
        measured = evaluate(trained.model, _collection(out), METRICS, depth=100).to_dict()
    record = {
        "cell": cell,
        "k": trained.calibration["k"],
        "shift": trained.calibration["shift"],
        **{name: measured[name] for name in (*METRICS, "query_active_dims", "document_active_dims", "flops")},
        "training_active_dims": [trained.query_active_dims, trained.document_active_dims],
        "seconds": trained.seconds,
        "before": trained.calibration["before"],
        "after": trained.calibration["after"],
        "monitoring": trained.monitoring,
        "log": trained.log,
    }
    write_whole(target, json.dumps(record))
    return target


def run_all(cells: list[Cell], out: Path, workers: int) -> None:
    missing = [cell for cell in cells if not cell_file(out, cell).exists()]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run_cell, cell, out) for cell in missing]
        for future in tqdm(as_completed(futures), total=len(futures), desc="runs", file=sys.stderr):
            future.result()


# ---------------------------------------------------------------------------------------- the cells


def grid(backbone: str, folder: str) -> list[Cell]:
    base = {"backbone": backbone, "folder": folder, "inflation": 1, "seed": 0}
    return [base | {"mode": "grid", "share": share, "excess": excess} for share in SHARES for excess in EXCESSES]


def paper(backbone: str, folder: str) -> list[Cell]:
    base = {"backbone": backbone, "folder": folder, "inflation": 1, "seed": 0, "shift": 0}
    return [base | {"mode": "paper", "k": k} for k in PAPER_K]


def others(backbone: str, folder: str) -> list[Cell]:
    """auto over all inflations and three seeds; nothing at all over the inflations."""
    cells = []
    for inflation in INFLATIONS:
        base = {"backbone": backbone, "folder": folder, "inflation": inflation}
        cells += [base | AUTO | {"mode": "auto", "seed": seed} for seed in (0, 1, 2)]
        cells.append(base | {"mode": "none", "k": 1, "shift": 0, "seed": 0})
    return cells


def variations(backbone: str, folder: str) -> list[Cell]:
    """A shift of each term's own under ``auto``; other learning rates for ``auto`` and the paper's k."""
    base = {"backbone": backbone, "folder": folder, "inflation": 1}
    cells = [base | AUTO | {"mode": "per term", "seed": seed} for seed in (0, 1, 2)]
    for rate in (2e-4, 2.4e-3):
        options = {"options": {"learning_rate": rate}, "seed": 0}
        cells.append(base | AUTO | {"mode": "auto"} | options)
        cells.append(base | {"mode": "paper", "k": 4, "shift": 0} | options)
    return cells


LAMBDAS = (1e-3, 1e-2, 3e-2)
TARGETS: tuple[dict[str, int], ...] = (
    {"document_active_dims": 30},
    {"query_active_dims": 12, "document_active_dims": 40},
)


def sparsity(backbone: str, folder: str) -> list[Cell]:
    """Active dims as a target, and weights set by hand, with three seeds each."""
    base = {"backbone": backbone, "folder": folder, "inflation": 1} | AUTO
    cells = []
    for seed in (0, 1, 2):
        for goal in TARGETS:
            cells.append(base | {"mode": "target", "seed": seed, "options": goal})
        for weight in LAMBDAS:
            by_hand = {"query_regularizer_weight": weight, "document_regularizer_weight": weight}
            cells.append(base | {"mode": "lambda", "seed": seed, "options": by_hand})
    return cells


def best_with_seeds(cells: list[Cell], out: Path, count: int) -> list[Cell]:
    """The cells of highest RR@10 with one seed, each with two more."""
    records = sorted((json.loads(cell_file(out, cell).read_text()) for cell in cells), key=lambda r: -r["RR@10"])
    return [record["cell"] | {"seed": seed} for record in records[:count] for seed in (1, 2)]


# ------------------------------------------------------------------------------------- the summary


def spread(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds, cost beside them."""
    values = [record["RR@10"] for record in records]
    return {
        "runs": len(values),
        "k": float(np.mean([record["k"] for record in records])),
        "shift": float(np.mean([record["shift"] for record in records])),
        "RR@10": float(np.mean(values)),
        "RR@10 sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "RR@10 lowest": min(values),
        **{
            name: float(np.mean([record[name] for record in records]))
            for name in ("nDCG@10", "query_active_dims", "document_active_dims", "flops")
        },
    }


def by_seed(cells: list[Cell], out: Path) -> list[list[dict[str, Any]]]:
    """Records grouped by everything but the seed; only what has been run."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        if cell_file(out, cell).exists():
            key = json.dumps({name: value for name, value in cell.items() if name != "seed"}, sort_keys=True)
            groups.setdefault(key, []).append(json.loads(cell_file(out, cell).read_text()))
    return list(groups.values())


def with_seeds(cells: list[Cell]) -> list[Cell]:
    return [cell | {"seed": seed} for cell in cells for seed in (0, 1, 2)]


def summarize(backbone: str, folder: str, out: Path) -> dict[str, Any]:
    grids = [spread(group) for group in by_seed(with_seeds(grid(backbone, folder)), out)]
    best = max((row for row in grids if row["runs"] == 3), key=lambda row: row["RR@10"])
    papers = [spread(group) for group in by_seed(with_seeds(paper(backbone, folder)), out)]
    rows = [{"mode": "best of the grid", "inflation": 1} | best]
    rows.append({"mode": "paper, best k", "inflation": 1} | max(papers, key=lambda row: (row["runs"], row["RR@10"])))
    for group in by_seed(others(backbone, folder) + variations(backbone, folder), out):
        cell = group[0]["cell"]
        rows.append({"mode": cell["mode"], "inflation": cell["inflation"], **cell.get("options", {})} | spread(group))
    for row in rows:
        row |= {"backbone": backbone, "of best": row["RR@10"] / best["RR@10"]}
        row["dims of best"] = row["document_active_dims"] / best["document_active_dims"]
    everything = with_seeds(grid(backbone, folder) + paper(backbone, folder))
    everything += others(backbone, folder) + variations(backbone, folder) + sparsity(backbone, folder)
    records = [record for group in by_seed(everything, out) for record in group]
    return {
        "rows": rows,
        "grid": grids,
        "paper": papers,
        "alarms": alarms(records, best["RR@10"], json.loads((Path(folder) / "config.json").read_text())["vocab_size"]),
        "start": start(backbone, folder, out, best["RR@10"]),
        "sparsity": targets(backbone, folder, out),
    }


def start(backbone: str, folder: str, out: Path, best: float) -> dict[str, Any]:
    """What is known of the grid's and the paper's cells before the first step, and how it goes with RR@10 (Spearman)."""
    whole = _probe(folder, out)
    probe = replace(whole, token_logits=whole.token_logits[::16])
    rows = []
    for cell in grid(backbone, folder) + paper(backbone, folder):
        record = json.loads(cell_file(out, cell).read_text())
        seen = summarize_probe(probe.affine(record["k"], record["shift"], "scale"))
        if seen.start_loss is None:
            raise ValueError("the probe's queries and documents must be pairs")
        row = {"RR@10, of best": record["RR@10"] / best, "loss over guessing": seen.start_loss / seen.chance}
        rows.append(row | {name: getattr(seen, name) for name in START})
    found = [row["RR@10, of best"] for row in rows]
    names = ("loss over guessing", *START)
    return {"correlations": {name: float(spearmanr(found, [row[name] for row in rows])[0]) for name in names}, "cells": rows}


def alarms(records: list[dict[str, Any]], best: float, vocabulary: int) -> dict[str, Any]:
    """What the monitor says of runs that ended badly (under a quarter of the best), well (over 0.8), and between."""
    counts: dict[str, Any] = {name: {"runs": 0, "flagged": 0} for name in ("collapsed", "between", "healthy")}
    wrong = []
    for record in records:
        value = record["RR@10"] / best
        kind = "collapsed" if value < 0.25 else "healthy" if value > 0.8 else "between"
        seen = [Observation(**observation) for observation in record["monitoring"]["observations"]]
        found = diagnose(seen, vocabulary)
        early = [f for f in found if f.collapse and f.step <= SETTINGS["steps"] / 5]
        counts[kind]["runs"] += 1
        counts[kind]["flagged"] += bool(early)
        if (kind == "collapsed" and not early) or (kind == "healthy" and any(f.collapse for f in found)):
            cell = {name: value for name, value in record["cell"].items() if name != "folder"}
            wrong.append({"cell": cell, "RR@10": record["RR@10"], "findings": [[f.name, f.step] for f in found]})
    return counts | {"wrong": wrong}


def targets(backbone: str, folder: str, out: Path) -> list[dict[str, Any]]:
    """The controller's runs beside what weights set by hand reach at the same document active dims."""
    groups = by_seed(sparsity(backbone, folder), out)
    hand = [spread(group) for group in groups if group[0]["cell"]["mode"] == "lambda"]
    hand.sort(key=lambda row: row["document_active_dims"])
    rows = []
    for group in groups:
        if group[0]["cell"]["mode"] == "target" and hand:
            goal = group[0]["cell"]["options"]
            row = {"target": goal} | spread(group)
            row["ends over target"] = {
                name: [record["training_active_dims"][name == "document_active_dims"] / target for record in group]
                for name, target in goal.items()
            }
            row["nDCG@10 by hand at this cost"] = float(
                np.interp(
                    np.log(row["document_active_dims"]),
                    [np.log(h["document_active_dims"]) for h in hand],
                    [h["nDCG@10"] for h in hand],
                )
            )
            rows.append(row)
    return [*rows, *({"lambda by hand": True} | h for h in hand)]


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for cells and what they need")
    parser.add_argument("--backbones", nargs="+", required=True, metavar="FOLDER")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--only",
        nargs="*",
        default=["grid", "paper", "others", "seeds", "variations", "sparsity"],
        help="stages to run; none for the table alone",
    )
    parser.add_argument("--json", type=Path, help="write the summary here")
    options = parser.parse_args()
    backbones = {Path(folder).name: str(Path(folder).resolve()) for folder in options.backbones}
    if len(backbones) < len(options.backbones):  # what is made of them is kept by name
        parser.error("two backbones have the same name; rename a folder")
    out = options.out.resolve()
    if not (out / "collection").exists():
        write_collection(out / "collection", *load_python_docs())
    for stage, make in (
        ("grid", grid),
        ("paper", paper),
        ("others", others),
        ("variations", variations),
        ("sparsity", sparsity),
    ):
        if stage in options.only:
            run_all([cell for item in backbones.items() for cell in make(*item)], out, options.workers)
    if "seeds" in options.only:
        more = []
        for item in backbones.items():
            more += best_with_seeds(grid(*item), out, 3) + best_with_seeds(paper(*item), out, 1)
        run_all(more, out, options.workers)
    summary = {name: summarize(name, folder, out) for name, folder in backbones.items()}
    show(summary)
    if options.json:
        record = {"settings": SETTINGS, "backbones": summary, "provenance": provenance()}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
