"""Training on questions and paragraphs: in-domain and zero-shot effectiveness, raw and calibrated; distillation against contrast.

Both experiments train on SQuAD pairs and evaluate on collections in BEIR layout that lie in --data (see --help). Every
run is a cell with a file of its own in --out, which is made once; an interrupted experiment goes on.

transfer      each backbone, raw head and calibrated, three seeds; nDCG@10 in-domain and on two other collections
distillation  the same examples with four BM25 negatives each, the same steps and the same wanted active dims, trained
              by contrast and from a teacher's scores: BM25's, and those of a cross-encoder trained on the spot
"""

import argparse
import hashlib
import json
import multiprocessing
import random
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from scipy.stats import ttest_rel
from sentence_transformers import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from anysplade import TrainingConfig, evaluate, load_pairs, mine, score, train
from anysplade._common.files import write_whole
from anysplade._common.provenance import provenance
from anysplade.evaluation.comparisons import distinct_names

TRAINING = ("squad-dev", "squad-nqg-sentences")
IN_DOMAIN = "squad-dev"
COLLECTIONS = (IN_DOMAIN, "vaswani", "cisi")
METRICS = ("nDCG@10", "RR@10", "R@100")
COSTS = ("query_active_dims", "document_active_dims", "flops")
SEEDS = (0, 1, 2)
SETTINGS: dict[str, Any] = {"steps": 300, "batch_size": 32, "learning_rate": 8e-4, "max_length": 96, "checkpoint_steps": 10**6}
HEADS: dict[str, dict[str, Any]] = {"raw": {"k": 1, "shift": 0}, "auto": {"k": "auto", "shift": "auto"}}
# Equal cost in products (steps, texts a step) and in the index (wanted active dims).
DISTILLATION: dict[str, Any] = {
    "steps": 200, "batch_size": 16, "learning_rate": 8e-4, "max_length": 96, "checkpoint_steps": 10**6,
    "query_active_dims": 20, "document_active_dims": 80,
}  # fmt: skip
EXAMPLES = 5000
NEGATIVES = 4
OBJECTIVES: dict[str, dict[str, Any]] = {
    "contrastive": {},
    "kl": {"objective": "kl"},
    "contrastive + kl": {"objective": "contrastive + kl"},
}
WITH_CROSS_ENCODER = ("contrastive + kl",)
Cell = dict[str, Any]


def examples(data: Path, out: Path, most: int | None = None) -> str:
    """The pairs of all training sets in one file, or a sample of them."""
    path = out / f"pairs-{most or 'all'}.jsonl"
    if not path.exists():
        pairs = [pair for name in TRAINING for pair in load_pairs(data / name)]
        pairs = random.Random(0).sample(pairs, most or len(pairs))
        write_whole(path, "".join(json.dumps({"query": p.query, "positive": p.positive}) + "\n" for p in pairs))
    return str(path)


def train_teacher(backbone: str, mined: str, folder: Path) -> str:
    """A cross-encoder on the backbone's encoder, trained on each positive against its mined negatives."""
    if (folder / "config.json").exists():
        return str(folder)
    torch.manual_seed(0)
    rows = [row for pair in load_pairs(mined) for row in ((pair.query, pair.positive, 1.0), (pair.query, pair.negatives[0], 0.0))]
    model = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1)
    model.save_pretrained(folder / "start")
    AutoTokenizer.from_pretrained(backbone).save_pretrained(folder / "start")
    encoder = CrossEncoder(str(folder / "start"), max_length=160)
    arguments = CrossEncoderTrainingArguments(
        str(folder / "checkpoints"), max_steps=400, per_device_train_batch_size=32, learning_rate=5e-4, warmup_steps=0.1, seed=0,
        save_strategy="no", report_to="none", use_cpu=True,
    )  # fmt: skip
    columns = dict(zip(("query", "document", "label"), map(list, zip(*rows, strict=True)), strict=True))
    CrossEncoderTrainer(encoder, arguments, Dataset.from_dict(columns), loss=BinaryCrossEntropyLoss(encoder)).train()
    encoder.save_pretrained(str(folder))
    return str(folder)


def name_of(cell: Cell) -> str:
    return hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:16]


def run(cell: Cell, data: Path, out: Path) -> Cell:
    """Train and evaluate; kept in the cell's file."""
    torch.set_num_threads(1)
    name = name_of(cell)
    config = TrainingConfig(cell["backbone"], cell["data"], output=str(out / "runs" / name), **cell["options"])
    trained = train(config)
    results = {}
    for collection in cell["collections"]:
        found = evaluate(trained.model, str(data / collection), METRICS, depth=100).to_dict()
        results[collection] = {key: found[key] for key in (*METRICS, *COSTS)}
    findings = [finding["name"] for finding in trained.monitoring["findings"]]
    made = {"calibration": {key: trained.calibration[key] for key in ("k", "shift")}, "findings": findings, "results": results}
    cost = {"seconds": round(trained.seconds), "level_trim": trained.level_trim}
    write_whole(out / "cells" / f"{name}.json", json.dumps({"cell": cell} | made | cost, indent=1) + "\n")
    return cell | made


def run_all(cells: list[Cell], data: Path, out: Path, workers: int) -> None:
    missing = [cell for cell in cells if not (out / "cells" / f"{name_of(cell)}.json").exists()]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run, cell, data, out) for cell in missing]
        for future in tqdm(as_completed(futures), total=len(futures), desc="cells", file=sys.stderr):
            future.result()


def read(cells: list[Cell], out: Path) -> list[Cell]:
    return [json.loads((out / "cells" / f"{name_of(cell)}.json").read_text()) for cell in cells]


def row(label: dict[str, Any], cells: list[Cell]) -> dict[str, Any]:
    """Mean and standard deviation over seeds, a collection each."""
    found: dict[str, Any] = {}
    for collection in cells[0]["results"]:
        values = {key: [cell["results"][collection][key] for cell in cells] for key in (*METRICS, *COSTS)}
        found[collection] = {key: statistics.mean(value) for key, value in values.items()}
        found[collection]["nDCG@10 sd"] = statistics.stdev(values["nDCG@10"])
        found[collection]["nDCG@10 by seed"] = values["nDCG@10"]
    first = cells[0]
    findings = sorted({name for cell in cells for name in cell["findings"]})
    return label | {"calibration": first["calibration"], "findings": findings, "results": found}


def bm25_row(data: Path, collections: tuple[str, ...]) -> dict[str, Any]:
    results = {name: evaluate("bm25", str(data / name), METRICS, depth=100).metrics for name in collections}
    return {"model": "bm25", "results": results}


def transfer(backbones: dict[str, str], data: Path, out: Path, workers: int) -> list[dict[str, Any]]:
    pairs = examples(data, out)
    cells = {
        (backbone, head): [
            {"backbone": folder, "data": pairs, "options": SETTINGS | options | {"seed": seed}, "collections": COLLECTIONS}
            for seed in SEEDS
        ]
        for backbone, folder in backbones.items()
        for head, options in HEADS.items()
    }
    run_all([cell for group in cells.values() for cell in group], data, out, workers)
    rows = [row({"model": backbone, "head": head}, read(group, out)) for (backbone, head), group in cells.items()]
    return [*rows, bm25_row(data, COLLECTIONS)]


def distillation(backbone: str, data: Path, out: Path, workers: int) -> list[dict[str, Any]]:
    mined = str(out / "mined.jsonl")
    mine(examples(data, out, EXAMPLES), mined, negatives=NEGATIVES, margin=0.05, progress=True)
    teachers = {"bm25": "bm25", "cross-encoder": train_teacher(backbone, mined, out / "teacher")}
    for name, teacher in teachers.items():
        score(mined, out / f"scored-{name}.jsonl", teacher=teacher, max_length=160, progress=True)
    groups: dict[tuple[str, str], list[Cell]] = {}
    for teacher in teachers:
        for objective, options in OBJECTIVES.items():
            if teacher != "bm25" and objective not in WITH_CROSS_ENCODER:
                continue
            groups[objective, "none" if objective == "contrastive" else teacher] = [
                {
                    "backbone": backbone,
                    "data": str(out / f"scored-{teacher}.jsonl"),
                    "options": DISTILLATION | options | {"seed": seed},
                    "collections": (IN_DOMAIN,),
                }
                for seed in SEEDS
            ]
    run_all([cell for group in groups.values() for cell in group], data, out, workers)
    rows = [row({"objective": objective, "teacher": teacher}, read(group, out)) for (objective, teacher), group in groups.items()]
    base = rows[0]["results"][IN_DOMAIN]["nDCG@10 by seed"]
    for other in rows[1:]:
        values = other["results"][IN_DOMAIN]["nDCG@10 by seed"]
        other["nDCG@10 less contrastive"] = statistics.mean(values) - statistics.mean(base)
        other["p (paired t over seeds)"] = float(ttest_rel(values, base).pvalue)
    return [*rows, {"teacher ranks": teachers_ranking(out, teachers)}]


def teachers_ranking(out: Path, teachers: dict[str, str]) -> dict[str, float]:
    """How often a teacher puts the positive first among its negatives."""
    return {
        name: statistics.mean(max(pair.scores) == pair.scores[0] for pair in load_pairs(out / f"scored-{name}.jsonl"))
        for name in teachers
    }


def show(rows: list[dict[str, Any]]) -> None:
    for found in rows:
        if "results" not in found:
            print(found)
            continue
        label = ", ".join(str(found[key]) for key in ("model", "head", "objective", "teacher") if key in found)
        for collection, values in found["results"].items():
            sd = f" ± {values['nDCG@10 sd']:.3f}" if "nDCG@10 sd" in values else ""
            dims = (
                f"{values['query_active_dims']:.0f} / {values['document_active_dims']:.0f} | {values['flops']:.2f}"
                if sd
                else "– | –"
            )
            print(f"| {label} | {collection} | {values['nDCG@10']:.3f}{sd} | {values['R@100']:.3f} | {dims} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=["transfer", "distillation"])
    parser.add_argument("--data", type=Path, required=True, help=f"folder of {', '.join({*TRAINING, *COLLECTIONS})}")
    parser.add_argument("--backbones", nargs="+", required=True, metavar="FOLDER", help="distillation takes the first")
    parser.add_argument("--out", type=Path, required=True, help="folder for the cells and what they need")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    paths = [Path(folder).resolve() for folder in options.backbones]
    backbones = dict(zip(distinct_names([path.name for path in paths], paths), options.backbones, strict=True))
    if options.experiment == "transfer":
        rows, settings = transfer(backbones, options.data, options.out, options.workers), SETTINGS
    else:
        rows, settings = distillation(options.backbones[0], options.data, options.out, options.workers), DISTILLATION
    show(rows)
    if options.json:
        write_whole(options.json, json.dumps({"settings": settings, "rows": rows, "provenance": provenance()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
