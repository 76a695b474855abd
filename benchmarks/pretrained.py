"""Published weights of ordinary size: a head for a dense model, its calibration, a teacher, and adaptation without labels.

Needs --data, a folder of collections and training pairs in BEIR layout, and models in folders: --dense, a dense model of
sentence-transformers without an MLM head (all-MiniLM-L6-v2); --teacher, a better one (all-mpnet-base-v2); --splade, a published
SPLADE. Everything is kept in --out: an interrupted experiment resumes.

heads        on which loss a head is trained, and whether the encoder is trained too; measured by nDCG@10 after a short training
calibration  the dense model with a head, raw, with fixed k and with auto: three seeds at one learning rate, one at a quarter
             of it and one at four times of it
teachers     the same model, trained on pairs with hard negatives, with and without a teacher, three seeds at equal cost; one seed
             with both losses
adapt        the SPLADE adapted to the documents of each of --collections without labels, three seeds
distil       the dense model with a head, trained on pairs with one hard negative by BM25, three seeds; alone and with BM25 added to
             its scores, beside BM25, the dense model, their fusion, and the SPLADE with and without BM25
epochs       time per step with a teacher whose vectors are known, and without a teacher
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForMaskedLM

from anysplade import TrainingConfig, adapt, evaluate, mine, train, train_head
from anysplade._common.files import write_atomic
from anysplade.data.collections import load_collection
from anysplade.evaluation.comparisons import compare
from anysplade.evaluation.costs import COSTS, OWN_WORDS
from anysplade.evaluation.fusion import evaluate_fused, evaluate_lexical
from anysplade.model.hardware import native_bfloat16
from anysplade.search.fusion import Fusion
from anysplade.study.cells import METRIC
from anysplade.training.head_trainer import WEIGHTS
from experiments import NEVER, parser, sample_examples, table_row, untrained_row, write_json

TRAINING = ("squad-dev", "squad-nqg-sentences", "medquad", "wikipedia-title-para", "tldr")
COLLECTIONS = ("squad-dev", "vaswani", "cisi", "cosqa")
EXAMPLES = 7200  # of the 110,507 pairs
SEEDS = (0, 1, 2)
LEARNING_RATE = 1e-4
PRECISION = "bfloat16" if native_bfloat16("cpu") else "float32"
SHORT: dict[str, Any] = {"batch_size": 16, "max_length": 48, "precision": PRECISION, "checkpoint_steps": NEVER}
HEADS: dict[str, dict[str, Any]] = {
    "raw": {"k": 1, "shift": 0},
    "k=4": {"k": 4, "shift": 0},
    "k=8": {"k": 8, "shift": 0},
    "auto": {"k": "auto", "shift": "auto"},
}
HEAD: dict[str, Any] = {"steps": 300, "batch_size": 16, "max_length": 96, "learning_rate": 2e-3}
# For each arm, the weights of the parts of the head's loss and the options of ``train_head``.
ARMS: dict[str, tuple[dict[str, float], dict[str, Any]]] = {
    "named and bag of words": ({}, {}),
    "masked words": ({"masked": 1.0, "named": 0.0, "bag": 0.0}, {}),
    "named words": ({"bag": 0.0}, {}),
    "bag of words": ({"named": 0.0}, {}),
    "named and bag of words, 100 steps": ({}, {"steps": 100}),
    "all three": ({"masked": 1.0}, {}),
    "named and bag of words, 1,000 steps": ({}, {"steps": 1000}),
    "named and bag of words, encoder too": ({}, {"encoder_learning_rate": 5e-5}),
}
TAUGHT: dict[str, Any] = SHORT | {
    "steps": 400, "max_length": 96, "learning_rate": LEARNING_RATE, "negatives": 1, "query_active_dims": 30,
    "document_active_dims": 150,
}  # fmt: skip
DISTILLED: dict[str, Any] = SHORT | {
    "steps": 400, "max_length": 96, "learning_rate": LEARNING_RATE, "negatives": 1, "query_active_dims": 14,
    "document_active_dims": 70,
}  # fmt: skip
WEIGHTS_OF_BM25 = (1.0, 2.0, 3.0, 4.0, 6.0)
FUSIONS: tuple[Fusion, ...] = ("rrf", "wsum")
FEW = ("squad-dev", "cisi")  # in-domain and zero-shot, where the four would take too long
LENGTH = 256  # tokens after which texts are cut in evaluation
PLACES = ("backbone", "data", "output", "teacher")  # settings that name a folder, which may have moved when a run resumes
ADAPT: dict[str, Any] = {"steps": 200, "batch_size": 16, "learning_rate": 1e-4, "max_length": 96, "precision": PRECISION}


def examples(options: argparse.Namespace) -> str:
    """A sample of the pairs of all training sets, in one file."""
    sources = [options.data / name / "pairs.jsonl" for name in TRAINING]
    return sample_examples(sources, options.out / f"pairs-{EXAMPLES}.jsonl", EXAMPLES)


def with_head(options: argparse.Namespace, name: str = "head", **changes: Any) -> str:
    """The dense model with a head trained on --text."""
    train_head(options.dense, options.text, options.out / name, **HEAD | changes)
    return str(options.out / name)


def run(
    trainings: dict[str, TrainingConfig], collections: Sequence[str], options: argparse.Namespace, length: int = LENGTH
) -> dict[str, dict[str, Any]]:
    """Train and evaluate in parallel; each record is kept in ``runs/NAME.json``."""
    paths = [str(options.data / name) for name in collections]
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        jobs = {
            name: pool.submit(run_one, config, paths, options.out / "runs" / f"{name}.json", length)
            for name, config in trainings.items()
        }
        return {name: job.result() for name, job in jobs.items()}


def run_one(config: TrainingConfig, collections: Sequence[str], record: Path, length: int) -> dict[str, Any]:
    known = json.loads(record.read_text()) if record.exists() else {}
    settings = json.loads(json.dumps({name: value for name, value in asdict(config).items() if name not in PLACES}))
    # The record may lack newer options, which have their defaults; the precision depends on the machine.
    if known and any(settings[name] != value for name, value in known["config"].items() if name != "precision"):
        sys.exit(f"{record}: belongs to another training; remove it or choose another --out")
    if not known:
        torch.set_num_threads(1)
        trained = train(config)
        calibrated = {name: trained.calibration[name] for name in ("k", "shift")}
        findings = sorted({finding["name"] for finding in trained.monitoring["findings"]})
        known = {"config": settings, **calibrated, "findings": findings, "seconds": trained.seconds, "results": {}}
    for path in collections:
        if Path(path).name not in known["results"]:
            found = evaluate(Path(config.output) / "model", path, [METRIC], depth=100, max_length=length, precision=PRECISION)
            costs = {name: getattr(found, name) for name in COSTS}
            known["results"][Path(path).name] = found.metrics | costs
            write_atomic(record, json.dumps(known, indent=1) + "\n")
    return known


def row(label: dict[str, Any], records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row of a table, with the mean over the collections and the precision of the trainings."""
    scores = {name: [record["results"][name] for record in records] for name in records[0]["results"]}
    start = {name: records[0][name] for name in ("k", "shift")}
    made = table_row(label, start, (name for record in records for name in record["findings"]), scores)
    made["mean"] = statistics.mean(result[METRIC] for result in made["results"].values())
    return made | {"precision": sorted({record["config"]["precision"] for record in records})}


def as_dense(model: str, options: argparse.Namespace, collections: Sequence[str] = COLLECTIONS) -> dict[str, Any]:
    """nDCG@10 of a dense model."""
    given: dict[str, Any] = {"max_length": LENGTH, "precision": PRECISION, "cache": options.out / "vectors", "progress": True}
    return untrained_row(model, options.data, collections, [METRIC], **given)


def bm25(options: argparse.Namespace, collections: Sequence[str]) -> dict[str, Any]:
    return untrained_row("bm25", options.data, collections, [METRIC])


def heads(options: argparse.Namespace) -> list[dict[str, Any]]:
    defaults, trainings, losses = dict(WEIGHTS), {}, {}
    for arm, (weights, changes) in ARMS.items():
        WEIGHTS.update(defaults | weights)
        name = "head-" + "".join(c if c.isalnum() else "-" for c in arm)
        made = train_head(options.dense, options.text, options.out / name, **HEAD | changes)
        losses[arm] = {"losses": made.losses, "seconds": made.seconds}
        data, output = str(options.data / "squad-dev" / "pairs.jsonl"), str(options.out / f"{name}-trained")
        trainings[arm] = TrainingConfig(made.model, data, output=output, **SHORT, steps=100, learning_rate=LEARNING_RATE)
    WEIGHTS.update(defaults)
    records = run(trainings, FEW, options, LENGTH // 2)
    rows = [row({"arm": arm} | losses[arm], [records[arm]]) for arm in trainings]
    for line, (arm, config) in zip(rows, trainings.items(), strict=True):
        if "encoder_learning_rate" in ARMS[arm][1]:  # what it costs the dense model
            dense = with_encoder_of(config.backbone, options)
            line["as a dense model"] = as_dense(dense, options, FEW)["results"]
    return [*rows, as_dense(options.dense, options, FEW), bm25(options, FEW)]


def with_encoder_of(backbone: str, options: argparse.Namespace) -> str:
    """The dense model with the encoder of a masked LM that was made from it."""
    folder = Path(f"{backbone}-dense")
    if not folder.exists():
        model: Any = SentenceTransformer(options.dense)
        missing = model[0].model.load_state_dict(
            AutoModelForMaskedLM.from_pretrained(backbone).base_model.state_dict(), strict=False
        )
        assert all("pooler" in key for key in missing.missing_keys), missing
        model.save_pretrained(str(folder))
    return str(folder)


def calibration(options: argparse.Namespace) -> list[dict[str, Any]]:
    data, backbone = examples(options), with_head(options)
    trainings, groups = {}, {}
    for rate, seeds in ((LEARNING_RATE, SEEDS), (LEARNING_RATE / 4, SEEDS[:1]), (4 * LEARNING_RATE, SEEDS[:1])):
        for head, choice in HEADS.items():
            groups[head, rate] = [f"calibration {head} {rate:g} {seed}" for seed in seeds]
            for seed, name in zip(seeds, groups[head, rate], strict=True):
                settings = SHORT | choice | {"steps": 400, "learning_rate": rate, "seed": seed}
                trainings[name] = TrainingConfig(backbone, data, output=str(options.out / name), **settings)
    records = run(trainings, FEW, options, LENGTH // 2)  # raw heads make every text long, and twenty runs are evaluated
    rows = [row({"head": head, "learning_rate": rate}, [records[name] for name in names]) for (head, rate), names in groups.items()]
    return [*rows, bm25(options, FEW)]


def teachers(options: argparse.Namespace) -> list[dict[str, Any]]:
    data, backbone = examples(options), with_head(options)
    shared = {name: TAUGHT[name] for name in ("negatives", "max_length", "precision")} | {"progress": True}
    mine(data, options.out / "by-words.jsonl", miner="bm25", **shared)
    mine(data, options.out / "by-teacher.jsonl", miner=["bm25", options.teacher], teacher=options.teacher, **shared)
    taught = {"data": str(options.out / "by-teacher.jsonl"), "teacher": options.teacher}
    arms = {
        "contrastive": ({"data": str(options.out / "by-words.jsonl")}, SEEDS),
        "teacher": (taught | {"objective": "teacher"}, SEEDS),
        "contrastive + teacher": (taught, SEEDS[:1]),
    }
    names = {(arm, seed): f"teachers {arm} {seed}" for seed in SEEDS for arm in arms if seed in arms[arm][1]}
    trainings = {
        name: TrainingConfig(backbone, output=str(options.out / name), seed=seed, **TAUGHT | arms[arm][0])
        for (arm, seed), name in names.items()
    }
    records = run(trainings, COLLECTIONS, options)
    rows = [row({"objective": arm}, [records[names[arm, seed]] for seed in seeds]) for arm, (_, seeds) in arms.items()]
    return [*rows, as_dense(options.dense, options), bm25(options, COLLECTIONS)]


def adaptation(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for name in options.collections:
        corpus = str(options.data / name)
        found = [
            adapt(
                options.splade, corpus, options.out / f"adapt-{name}-{seed}", teacher=options.teacher, judged=corpus, seed=seed,
                progress=True, **ADAPT,
            )
            for seed in SEEDS
        ]  # fmt: skip
        rows.append(
            {
                "collection": name,
                "before": found[0].before,
                "after": [one.after for one in found],
                "kept": [one.kept for one in found],
                "p": [one.comparison["p"] for one in found],
                "gain": statistics.mean(one.after[METRIC] for one in found) / found[0].before[METRIC] - 1,
                "seconds": [one.seconds for one in found],
                "pairs": found[0].pairs,
            }
        )
    return [*rows, bm25(options, options.collections)]


def distillation(options: argparse.Namespace) -> list[dict[str, Any]]:
    data, backbone = examples(options), with_head(options)
    mined = options.out / "by-words.jsonl"
    mine(data, mined, miner="bm25", negatives=1, max_length=DISTILLED["max_length"], precision=PRECISION)
    sparse = {"published SPLADE": options.splade}
    for seed in options.seeds:
        config = TrainingConfig(backbone, str(mined), output=str(options.out / f"distil {seed}"), seed=seed, **DISTILLED)
        sparse[f"seed {seed}"] = train(config).model
    rows = []
    for name in COLLECTIONS:
        collection = load_collection(options.data / name, "test")
        shared: dict[str, Any] = {"max_length": LENGTH, "precision": PRECISION, "cache": options.out / "vectors"}
        models = {"bm25": "bm25", "dense": options.dense} | sparse
        found = {label: evaluate(model, collection, [METRIC], **shared) for label, model in models.items()}
        parts, compared = [found["bm25"], found["dense"]], dict(found)
        compared |= {f"bm25 and dense, {how}": evaluate_fused(parts, collection, how) for how in FUSIONS}
        for label in sparse:
            for weight in WEIGHTS_OF_BM25:
                compared[f"{label} + {weight:g} bm25"] = evaluate_lexical(found[label], collection, weight)
        for label, one in compared.items():
            costs = {cost: getattr(one, cost) for cost in (*COSTS, *OWN_WORDS)}
            rows.append({"collection": name, "model": label} | one.metrics | costs)
            rows[-1] |= {} if label == "bm25" else {"p against bm25": compare([found["bm25"], one])[0].p}
    return rows


def epochs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians of the time of a whole run of the same examples in turns; the teacher's vectors are known from the first one."""
    data, backbone = str(options.out / "by-teacher.jsonl"), with_head(options)
    settings = {name: value for name, value in TAUGHT.items() if not name.endswith("active_dims")} | {"steps": 30}
    arms = {"contrastive": {}, "contrastive + teacher": {"teacher": options.teacher}}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for turn in range(-1, 4):  # the first one warms up
        for arm, more in arms.items():
            output = options.out / "epochs" / f"{arm}-{turn}-{time.time_ns()}"
            taken = train(TrainingConfig(backbone, data, output=str(output), **settings | more)).seconds
            if turn >= 0:
                seconds[arm].append(taken)
    medians = {arm: statistics.median(taken) for arm, taken in seconds.items()}
    return [
        {"seconds of 30 steps": seconds, "medians": medians, "ratio": medians["contrastive + teacher"] / medians["contrastive"]}
    ]


EXPERIMENTS = {
    "heads": heads,
    "calibration": calibration,
    "teachers": teachers,
    "adapt": adaptation,
    "distil": distillation,
    "epochs": epochs,
}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("experiment", choices=EXPERIMENTS)
    folders = ", ".join(dict.fromkeys((*TRAINING, *COLLECTIONS)))
    arguments.add_argument("--data", type=Path, required=True, help=f"folder of {folders}")
    arguments.add_argument("--dense", help="folder of a dense model without an MLM head")
    arguments.add_argument("--teacher", help="folder of a dense model")
    arguments.add_argument("--splade", help="folder of a published SPLADE")
    arguments.add_argument("--text", help="file with one text per line, to train heads on")
    arguments.add_argument("--out", type=Path, required=True, help="folder for the trainings and what they need")
    arguments.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="for distil")
    arguments.add_argument("--collections", nargs="+", default=["vaswani", "cisi", "cosqa"], help="for adapt")
    options = arguments.parse_args()
    rows = EXPERIMENTS[options.experiment](options)
    print(json.dumps(rows, indent=1))
    write_json(options.json, {"experiment": options.experiment, "rows": rows})


if __name__ == "__main__":
    main()
