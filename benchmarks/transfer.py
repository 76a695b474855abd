"""Training on questions and paragraphs: in-domain and zero-shot effectiveness, raw and calibrated; distillation against contrast.

Both experiments train on SQuAD pairs and evaluate on collections in BEIR layout in --data (see --help). Every training is a cell,
kept in --out: an interrupted experiment resumes.

transfer      each backbone, raw head and calibrated, three seeds; nDCG@10 in-domain and on two other collections
distillation  the same examples with four BM25 negatives each, the same steps and the same target of active dims, trained
              by contrast and from the scores of a teacher: BM25, or a cross-encoder that is trained here
"""

import statistics
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from scipy.stats import ttest_rel
from sentence_transformers import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from anysplade import load_pairs, mine, score
from anysplade.evaluation.grid import distinct_names
from anysplade.study.cells import METRIC, METRICS
from anysplade.study.plan import Cell
from experiments import NEVER, cells_row, parser, run_groups, sample_examples, untrained_row, write_json

TRAINING = ("squad-dev", "squad-nqg-sentences")
IN_DOMAIN = "squad-dev"
COLLECTIONS = (IN_DOMAIN, "vaswani", "cisi")
SEEDS = 3
BY_SEED = f"{METRIC} by seed"
SETTINGS: dict[str, Any] = {"steps": 300, "batch_size": 32, "learning_rate": 8e-4, "max_length": 96, "checkpoint_steps": NEVER}
HEADS: dict[str, dict[str, Any]] = {"raw": {"k": 1, "shift": 0}, "auto": {"k": "auto", "shift": "auto"}}
# Equal cost in products (steps, texts per step) and in the index (the target of active dims).
DISTILLATION: dict[str, Any] = {
    "steps": 200, "batch_size": 16, "learning_rate": 8e-4, "max_length": 96, "checkpoint_steps": NEVER,
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


def examples(data: Path, out: Path, count: int | None = None) -> str:
    """The pairs of all training sets in one file, or a sample of them."""
    return sample_examples([data / name for name in TRAINING], out / f"pairs-{count or 'all'}.jsonl", count)


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


def transfer(backbones: dict[str, str], data: Path, out: Path, workers: int) -> list[dict[str, Any]]:
    pairs = examples(data, out)
    groups = {
        (backbone, head): Cell(folder, pairs, SETTINGS | options)
        for backbone, folder in backbones.items()
        for head, options in HEADS.items()
    }
    records = run_groups(groups, SEEDS, [str(data / name) for name in COLLECTIONS], out, workers)
    rows = [cells_row({"model": model, "head": head}, seeds) for (model, head), seeds in records.items()]
    return [*rows, untrained_row("bm25", data, COLLECTIONS, METRICS)]


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
    records = run_groups(groups, SEEDS, [str(data / IN_DOMAIN)], out, workers)
    rows = [cells_row({"objective": name, "teacher": used}, seeds) for (name, used), seeds in records.items()]
    base, *others = (one["results"][IN_DOMAIN][BY_SEED] for one in rows)
    for other, values in zip(rows[1:], others, strict=True):
        other["nDCG@10 less contrastive"] = statistics.mean(values) - statistics.mean(base)
        other["p (paired t over seeds)"] = float(ttest_rel(values, base).pvalue)
    return [*rows, {"teacher ranks": teacher_ranks(out, teachers)}]


def teacher_ranks(out: Path, teachers: dict[str, str]) -> dict[str, float]:
    """How often each teacher puts the positive first among its negatives."""
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
            sd, cost = "", "– | –"
            if BY_SEED in values:
                sd = f" ± {values[f'{METRIC} sd']:.3f}"
                cost = f"{values['query_active_dims']:.0f} / {values['document_active_dims']:.0f} | {values['flops']:.2f}"
            print(f"| {label} | {collection} | {values[METRIC]:.3f}{sd} | {values['R@100']:.3f} | {cost} |")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("experiment", choices=["transfer", "distillation"])
    arguments.add_argument("--data", type=Path, required=True, help=f"folder of {', '.join({*TRAINING, *COLLECTIONS})}")
    arguments.add_argument("--backbones", nargs="+", required=True, metavar="FOLDER", help="distillation takes the first")
    arguments.add_argument("--out", type=Path, required=True, help="folder for the cells and what they need")
    options = arguments.parse_args()
    paths = [Path(folder).resolve() for folder in options.backbones]
    backbones = dict(zip(distinct_names([path.name for path in paths], paths), options.backbones, strict=True))
    if options.experiment == "transfer":
        rows, settings = transfer(backbones, options.data, options.out, options.workers), SETTINGS
    else:
        rows, settings = distillation(options.backbones[0], options.data, options.out, options.workers), DISTILLATION
    show(rows)
    write_json(options.json, {"settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
