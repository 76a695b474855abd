"""Training on questions and paragraphs: in-domain and zero-shot effectiveness, raw and calibrated; distillation against contrast.

Both experiments train on SQuAD pairs and evaluate on collections in BEIR layout in --data (see --help). Every training is a
cell of the study's engine, kept in --out: an interrupted experiment resumes.

transfer      each backbone, raw head and calibrated, three seeds; nDCG@10 in-domain and on two other collections
distillation  the same examples with four BM25 negatives each, the same steps and the same target of active dims, trained
              by contrast and from a teacher's scores: BM25's, and those of a cross-encoder that is trained here
"""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from scipy.stats import ttest_rel
from sentence_transformers import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from anysplade import evaluate, load_pairs, mine, score
from anysplade._common.files import write_atomic
from anysplade._common.provenance import provenance
from anysplade.evaluation.comparisons import distinct_names
from anysplade.study.cells import METRIC, METRICS, Cell, CellRecord
from anysplade.study.run import run_cells

TRAINING = ("squad-dev", "squad-nqg-sentences")
IN_DOMAIN = "squad-dev"
COLLECTIONS = (IN_DOMAIN, "vaswani", "cisi")
MEASURES = dict(zip(METRICS, ("ndcg", "rr", "recall"), strict=True)) | {
    name: name for name in ("query_active_dims", "document_active_dims", "flops")
}
SEEDS = (0, 1, 2)
SETTINGS: dict[str, Any] = {"steps": 300, "batch_size": 32, "learning_rate": 8e-4, "max_length": 96, "checkpoint_steps": 10**6}
HEADS: dict[str, dict[str, Any]] = {"raw": {"k": 1, "shift": 0}, "auto": {"k": "auto", "shift": "auto"}}
# Equal cost in products (steps, texts a step) and in the index (the target of active dims).
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


def examples(data: Path, out: Path, most: int | None = None) -> str:
    """The pairs of all training sets in one file, or a sample of them."""
    path = out / f"pairs-{most or 'all'}.jsonl"
    if not path.exists():
        pairs = [pair for name in TRAINING for pair in load_pairs(data / name)]
        pairs = random.Random(0).sample(pairs, most or len(pairs))
        write_atomic(path, "".join(json.dumps({"query": p.query, "positive": p.positive}) + "\n" for p in pairs))
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


def run(groups: Sequence[Cell], collections: list[str], out: Path, workers: int) -> list[list[CellRecord]]:
    """The records of each cell, by seed."""
    cells = [[replace(cell, options={**cell.options, "seed": seed}) for seed in SEEDS] for cell in groups]
    records, failed = run_cells([cell for seeds in cells for cell in seeds], collections, out, workers, progress=True)
    if failed:
        sys.exit(f"{len(failed)} cells failed, the first one: {next(iter(failed.values()))}")
    return [[records[cell.hash] for cell in seeds] for seeds in cells]


def row(label: dict[str, Any], records: Sequence[CellRecord]) -> dict[str, Any]:
    """Mean and standard deviation over seeds for each collection."""
    results: dict[str, Any] = {}
    for path in records[0].results:
        values = {key: [getattr(record.results[path], name) for record in records] for key, name in MEASURES.items()}
        means = {key: statistics.mean(value) for key, value in values.items()}
        spread = {f"{METRIC} sd": statistics.stdev(values[METRIC]), f"{METRIC} by seed": values[METRIC]}
        results[Path(path).name] = means | spread
    findings = sorted({finding["name"] for record in records for finding in record.findings})
    calibration = {"k": records[0].k, "shift": records[0].shift}
    return label | {"calibration": calibration, "findings": findings, "results": results}


def bm25_row(data: Path, collections: tuple[str, ...]) -> dict[str, Any]:
    results = {name: evaluate("bm25", str(data / name), METRICS, depth=100).metrics for name in collections}
    return {"model": "bm25", "results": results}


def transfer(backbones: dict[str, str], data: Path, out: Path, workers: int) -> list[dict[str, Any]]:
    pairs = examples(data, out)
    groups = {
        (backbone, head): Cell(folder, pairs, SETTINGS | options)
        for backbone, folder in backbones.items()
        for head, options in HEADS.items()
    }
    records = run(list(groups.values()), [str(data / name) for name in COLLECTIONS], out, workers)
    rows = [row({"model": model, "head": head}, seeds) for (model, head), seeds in zip(groups, records, strict=True)]
    return [*rows, bm25_row(data, COLLECTIONS)]


def distillation(backbone: str, data: Path, out: Path, workers: int) -> list[dict[str, Any]]:
    mined = str(out / "mined.jsonl")
    mine(examples(data, out, EXAMPLES), mined, negatives=NEGATIVES, margin=0.05, progress=True)
    teachers = {"bm25": "bm25", "cross-encoder": train_teacher(backbone, mined, out / "teacher")}
    groups = {}
    for name, teacher in teachers.items():
        scored = str(out / f"scored-{name}.jsonl")
        score(mined, scored, teacher=teacher, max_length=160, progress=True)
        for objective, options in OBJECTIVES.items():
            if name == "bm25" or objective in WITH_CROSS_ENCODER:
                used = "none" if objective == "contrastive" else name
                groups[objective, used] = Cell(backbone, scored, {"k": "auto", "shift": "auto"} | DISTILLATION | options)
    records = run(list(groups.values()), [str(data / IN_DOMAIN)], out, workers)
    rows = [row({"objective": name, "teacher": used}, seeds) for (name, used), seeds in zip(groups, records, strict=True)]
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
    for line in rows:
        if "results" not in line:
            print(line)
            continue
        label = ", ".join(str(line[key]) for key in ("model", "head", "objective", "teacher") if key in line)
        for collection, values in line["results"].items():
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
        write_atomic(options.json, json.dumps({"settings": settings, "rows": rows, "provenance": provenance()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
