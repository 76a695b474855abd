"""Which k and shift train a head best, and how near calibration comes: many short runs, restartable.

For every backbone: a grid of scale and level, the paper's k alone, nothing at all, and ``auto``, for heads
inflated by 1/4, 1, 4 and 16. Every run is a cell with a file of its own in --out; what is there is not run
again. The table is made from the cells: effectiveness over seeds, cost, and what the monitor said.
"""

import argparse
import hashlib
import json
import multiprocessing
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from anysplade import TrainingConfig, evaluate, load_collection, load_pairs, rescale_head, train, write_collection
from anysplade.calibration import ACTIVE_SHARE, MEAN_EXCESS, choose, sample_pairs
from anysplade.datasets import load_python_docs
from anysplade.head import RECORD, load_masked_lm, measure_logits
from anysplade.provenance import provenance

SETTINGS: dict[str, Any] = {
    "steps": 90,
    "batch_size": 16,
    "learning_rate": 8e-4,
    "query_regularizer_weight": 3e-4,
    "document_regularizer_weight": 3e-4,
    "max_length": 64,
    "checkpoint_steps": 10**6,
}
INFLATIONS = (0.25, 1, 4, 16)
SHARES = (0.01, 0.003, 0.001, 0.0003)  # of the token logits above zero: the grid's levels
EXCESSES = (0.34, 0.68, 1.35, 2.7, 5.4)  # of the highest 0.3 % on average: the grid's scales
PAPER_K = (2, 4, 8, 16)
METRICS = ("RR@10", "nDCG@10")
Cell = dict[str, Any]


# ---------------------------------------------------------------------------------------- one cell


def cell_file(out: Path, cell: Cell) -> Path:
    return out / "cells" / f"{hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:16]}.json"


@cache
def _collection(out: Path) -> Any:
    return load_collection(out / "collection")


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
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=target.parent))
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        work.rename(target)
    return str(target)


def affine(cell: Cell, folder: str, out: Path) -> tuple[Any, Any]:
    """k and shift of a cell; of the grid's, by the level and the scale they give."""
    if "share" not in cell:
        return cell["k"], cell["shift"]
    probe = _probe(folder, out)
    level = np.quantile(probe.token_logits, 1 - ACTIVE_SHARE)
    excess = float(probe.token_logits[probe.token_logits > level].mean(dtype=np.float64) - level)
    k = excess / cell["excess"]
    return k, float(np.quantile(probe.token_logits / k, 1 - cell["share"]))


def run_cell(cell: Cell, out: Path) -> Path:
    """Train and evaluate one cell; its file appears when both are done."""
    torch.set_num_threads(1)
    target = cell_file(out, cell)
    if target.exists():
        return target
    folder = inflated(cell["folder"], cell["inflation"], out)
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
    target.parent.mkdir(parents=True, exist_ok=True)
    work_file = target.with_suffix(".part")
    work_file.write_text(json.dumps(record))
    work_file.rename(target)
    return target


def run_all(cells: list[Cell], out: Path, workers: int) -> list[dict[str, Any]]:
    missing = [cell for cell in cells if not cell_file(out, cell).exists()]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run_cell, cell, out) for cell in missing]
        for future in tqdm(as_completed(futures), total=len(futures), desc="runs", file=sys.stderr):
            future.result()
    return [json.loads(cell_file(out, cell).read_text()) for cell in cells]


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
        rule = {"share": ACTIVE_SHARE, "excess": MEAN_EXCESS}  # names the rule that "auto" was, so that a new one is run anew
        cells += [base | {"mode": "auto", "k": "auto", "shift": "auto", "seed": seed, "rule": rule} for seed in (0, 1, 2)]
        cells.append(base | {"mode": "none", "k": 1, "shift": 0, "seed": 0})
    return cells


def best_with_seeds(cells: list[Cell], out: Path, count: int) -> list[Cell]:
    """The cells of highest RR@10 with one seed, each with two more."""
    records = sorted((json.loads(cell_file(out, cell).read_text()) for cell in cells), key=lambda r: -r["RR@10"])
    return [record["cell"] | {"seed": seed} for record in records[:count] for seed in (1, 2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for cells and what they need")
    parser.add_argument("--backbones", nargs="+", required=True, metavar="FOLDER")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=["grid", "paper", "others", "seeds"], help="stages to run")
    parser.add_argument("--json", type=Path, help="write the summary here")
    options = parser.parse_args()
    out = options.out.resolve()
    if not (out / "collection").exists():
        write_collection(out / "collection", *load_python_docs())
    backbones = {Path(folder).name: str(Path(folder).resolve()) for folder in options.backbones}
    for stage, make in (("grid", grid), ("paper", paper), ("others", others)):
        if stage in options.only:
            run_all([cell for item in backbones.items() for cell in make(*item)], out, options.workers)
    if "seeds" in options.only:
        more = []
        for item in backbones.items():
            more += best_with_seeds(grid(*item), out, 3) + best_with_seeds(paper(*item), out, 1)
        run_all(more, out, options.workers)


if __name__ == "__main__":
    main()
