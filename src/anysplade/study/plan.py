"""The experiments of "Rescaling MLM-Head for Neural Sparse Retrieval" (arXiv 2606.18811), with the controls it lacks.

A study is a list of rows: a backbone, what is done to its head, how it is trained. A row has a cell for each seed
(``anysplade.study.cells``). Studies share cells, an interrupted study goes on, and a rerun does only what is missing.
"""

import json
import logging
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import KW_ONLY, asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from anysplade._common.files import write_whole
from anysplade._common.provenance import provenance
from anysplade._common.workers import devices_of_workers, take_device
from anysplade.data.collections import Collection, load_python_docs, write_collection
from anysplade.errors import AnyspladeError, OptionError, OutputError, worker_died
from anysplade.evaluation.evaluations import evaluate
from anysplade.model.backbones import BUNDLED
from anysplade.model.head import describe_head, load_masked_lm
from anysplade.study.arms import Arm, label
from anysplade.study.cells import METRICS, Cell, collection_hash, read_anew, read_cell, read_collection, run_cell
from anysplade.study.conclusions import summarize
from anysplade.study.report import write_report
from anysplade.training.config import TrainingConfig
from anysplade.training.run import duration, train

logger = logging.getLogger(__name__)

Name = Literal["norm", "tradeoff", "dynamics", "sensitivity", "controls", "main"]
STUDIES: tuple[Name, ...] = ("norm", "tradeoff", "dynamics", "sensitivity", "controls", "main")
# What trains the bundled backbones in half a minute on one core.
SMALL: dict[str, Any] = {
    "steps": 90,
    "batch_size": 16,
    "learning_rate": 8e-4,
    "query_regularizer_weight": 3e-4,
    "document_regularizer_weight": 3e-4,
    "max_length": 64,
}
WEIGHTS = (1, 10, 100)  # times the regularizers' weights: the tradeoff's points
LEVELS = (0.01, 0.003, 0.001, 0.0003)  # of the token logits above zero: the map's levels
_REHEARSED = 4  # steps that are timed before a study of a new backbone
_REHEARSED_TEXTS = 100


@dataclass(frozen=True)
class StudyConfig:
    """What a study is made of.

    Args:
        name: norm, tradeoff, dynamics, sensitivity, controls or main; all for all six.
        output: folder of the cells, and of the report of every study that was made there.
        backbones: masked LMs, folders or hub ids; the bundled ones if none is given.
        data: training examples, in any form that train takes.
        collections: what is evaluated; the first one is said to be in-domain.
        seeds: trainings of every row.
        k: the paper's; the main study also has its half and its double.
        training: train's options of all cells, by name.
        workers: cells at a time; one for every GPU, or for every core.
    """

    name: str
    _: KW_ONLY
    output: str
    backbones: tuple[str, ...] = tuple(BUNDLED)
    data: str = "python-docs"
    collections: tuple[str, ...] = ("python-docs",)
    seeds: int = 3
    k: float = 8.0
    training: Mapping[str, Any] = field(default_factory=lambda: dict(SMALL))
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.name != "all" and self.name not in STUDIES:
            raise OptionError(f"{self.name!r} is no study; choose of {', '.join(STUDIES)}, or all")
        for name, value in (("seeds", self.seeds), ("workers", self.workers)):
            if value is not None and value < 1:
                raise OptionError(f"{name} is {value}: it must be at least 1")
        if not 1 < self.k < float("inf"):
            raise OptionError(f"k is {self.k:g}: the paper's divides the head, so it must be above 1")
        if not self.backbones or not self.collections:
            raise OptionError("a study needs at least one backbone and one collection")
        for name, named in (("backbones", self.backbones), ("collections", self.collections)):
            short = [Path(one).name for one in named]
            if len(set(short)) < len(short):
                raise OptionError(f"{name}: two have the same name, {', '.join(short)}; the report could not tell them apart")
        TrainingConfig("backbone", "data", output="run", **self.training)  # refuses impossible values

    @property
    def names(self) -> tuple[Name, ...]:
        return STUDIES if self.name == "all" else (self.name,)  # type: ignore[return-value]


@dataclass(frozen=True)
class Row:
    """One line of a study: the same training with several seeds."""

    backbone: str  # as the report names it
    key: Arm
    arm: str  # its label
    cells: tuple[Cell, ...]  # by seed
    axis: dict[str, float] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------- the rows


def plan(name: Name, config: StudyConfig, norms: Mapping[str, float]) -> list[Row]:
    """The rows of a study.

    Args:
        norms: mean row norm of each backbone's decoder, for heads that are to have another's.
    """
    rows = []
    for backbone in config.backbones:
        arm = partial(_row, config, backbone)
        raw, scaled, auto = arm(Arm.RAW), arm(Arm.FIXED, k=config.k), arm(Arm.AUTO, k="auto", shift="auto")
        if name in ("norm", "dynamics"):
            rows += [raw, scaled, auto]
        elif name == "main":
            rows += [raw, *(arm(Arm.FIXED, k=k) for k in (config.k / 2, config.k, config.k * 2)), auto]
        elif name == "tradeoff":
            for weight in WEIGHTS:
                weights = {
                    side: config.training.get(side, getattr(TrainingConfig, side)) * weight
                    for side in ("query_regularizer_weight", "document_regularizer_weight")
                }
                point = {"weight": weights["document_regularizer_weight"]}
                rows.append(arm(Arm.RAW, axis=point, **weights))
                rows.append(arm(Arm.FIXED, axis=point, k=config.k, **weights))
                rows.append(arm(Arm.AUTO, axis=point, k="auto", shift="auto", **weights))
        elif name == "sensitivity":
            powers = [2.0**power for power in range(6)]
            rows += [arm(Arm.FIXED if k > 1 else Arm.RAW, axis={"k": k}, k=k) for k in powers]
            rows.append(auto)
            for k in powers[:4]:
                for level in LEVELS:
                    rows.append(arm(Arm.LEVEL, axis={"k": k, "level": level}, seeds=1, level=level, k=k))
        else:
            rows += [raw, scaled, auto, *_controls(config, arm, norms, backbone)]
    return rows


def _controls(config: StudyConfig, arm: Any, norms: Mapping[str, float], backbone: str) -> list[Row]:
    """Heads that differ from raw or from the paper's in one thing."""
    k = config.k
    rate = config.training.get("learning_rate", TrainingConfig.learning_rate)
    rows = [
        arm(Arm.BIAS_KEPT, k=k, bias="keep"),
        arm(Arm.LEFT_TIED, edits=(("tied", k),)),
        arm(Arm.FOLDED, edits=(("folded", k),)),
        # Adam's steps do not change with the scale of a gradient, so W with a scalar 1/k behind it moves as W/k does
        # at a kth of the learning rate.
        arm(Arm.RUNTIME_SCALAR, k=k, head_learning_rate=rate / k),
        arm(Arm.UNTIED, edits=(("untied", 1.0),)),
        arm(Arm.LARGER_STEPS, edits=(("untied", 1.0),), head_learning_rate=rate * k),
        arm(Arm.SMALL_NORM, edits=(("scaled", k), ("folded", 1 / k))),
        arm(Arm.TEMPERATURE, spread_of=k),
        arm(Arm.SHIFT_ALONE, shift="auto"),
        arm(Arm.SCALE_ALONE, k="auto"),
    ]
    low, high = min(norms.values()), max(norms.values())
    for key, norm in ((Arm.LOWEST_NORM, low), (Arm.HIGHEST_NORM, high)):
        if abs(norms[backbone] / norm - 1) > 0.01:  # otherwise it is the raw head
            rows.append(arm(key, edits=(("scaled", norms[backbone] / norm),)))
    return rows


def _row(
    config: StudyConfig, backbone: str, key: Arm, *, axis: dict[str, float] | None = None, seeds: int | None = None, **changes: Any
) -> Row:
    apart = {name: changes.pop(name) for name in ("edits", "level", "spread_of") if name in changes}
    options = {"k": 1.0, "shift": 0.0} | dict(config.training) | changes
    cells = tuple(
        Cell(backbone, config.data, options | {"seed": seed}, **apart) for seed in range(min(seeds or config.seeds, config.seeds))
    )
    k = options["k"] if key in (Arm.FIXED, Arm.LEVEL) else config.k
    return Row(Path(backbone).name, key, label(key, k, apart.get("level")), cells, axis or {})


# --------------------------------------------------------------------------------------- the runs


@dataclass(frozen=True)
class StudyResult:
    """What lies in ``study.json``: every study made in the folder, and every cell's numbers with what makes them again."""

    studies: dict[str, Any]
    cells: dict[str, Any]
    bm25: dict[str, Any]
    failed: dict[str, str]  # messages of cells that could not be run, by hash
    report: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_study(config: StudyConfig, progress: bool = False) -> StudyResult:
    """Run what is missing of a study, and write the report of all studies that were made in the folder.

    Interrupted and called again, it goes on: finished cells are kept, a half-trained one resumes.

    Raises:
        OutputError: another process works in the folder.
        AnyspladeError: no cell could be run, or a worker died; what ``train`` and ``evaluate`` raise, as far as it can be known
            before the first cell.
    """
    out = Path(config.output).expanduser()
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / "lock", timeout=0):
            return _run_study(_with_python_docs(config, out), out, progress)
    except Timeout:
        raise OutputError(f"{out}: another process runs a study there; wait for it, or choose another --out") from None
    except AnyspladeError:
        if new and not (out / "cells").exists():  # a mistake leaves nothing behind; an interruption leaves what is done
            shutil.rmtree(out)
        raise


def _run_study(config: StudyConfig, out: Path, progress: bool) -> StudyResult:
    read_anew()
    loaded = {name: read_collection(name) for name in config.collections}
    norms = {name: describe_head(load_masked_lm(name)[0], None, name).mean_row_norm for name in config.backbones}
    asked = {key: value for key, value in asdict(config).items() if key not in ("name", "output", "workers")}
    made: dict[str, Any] = {"studies": {}, "cells": {}, "bm25": {}}
    if (out / "study.json").exists():
        made = json.loads((out / "study.json").read_text(encoding="utf-8"))
        if not all("key" in row for study in made["studies"].values() for row in study["rows"]):
            raise OutputError(f"{out}/study.json: made by an older version; remove it (the cells stay, and are used again)")

    rows = {name: plan(name, config, norms) for name in config.names}
    cells = {cell.hash: cell for study in rows.values() for row in study for cell in row.cells}
    missing = [cell for cell in cells.values() if read_cell(out, cell, config.collections) is None]
    workers = config.workers or torch.cuda.device_count() or os.cpu_count() or 1
    if missing:
        seconds = _estimate(missing, config, out, loaded)
        logger.info(
            "%s: %d cells, %d of them done; %d to run, %d at a time, about %s",
            ", ".join(config.names),
            len(cells),
            len(cells) - len(missing),
            len(missing),
            workers,
            duration(seconds / workers),
        )
    failed = _run_cells(missing, config.collections, out, workers, progress)
    records = {hash_: record for hash_, cell in cells.items() if (record := read_cell(out, cell, config.collections))}
    if not records:
        raise AnyspladeError(f"{out}: no cell could be run; the first one: {next(iter(failed.values()))}")
    studies = {}
    for name, study in rows.items():
        there = [
            asdict(row)
            | {"cells": [cell.hash for cell in row.cells if cell.hash in records]}
            | {"failed": [failed[cell.hash] for cell in row.cells if cell.hash in failed]}
            for row in study
        ]
        summary = summarize(name, there, records, config.collections)
        studies[name] = {"settings": asked, **summary, "provenance": provenance()}
    baselines = {}
    for source, collection in loaded.items():
        if made["bm25"].get(source, {}).get("data_hash") != collection_hash(source):
            found = evaluate("bm25", collection, METRICS, depth=100)
            baselines[source] = found.metrics | {"data_hash": found.data_hash}
    result = StudyResult(
        studies=dict(sorted((made["studies"] | studies).items(), key=lambda item: STUDIES.index(item[0]))),
        cells=made["cells"] | {hash_: _short(record) for hash_, record in records.items()},
        bm25=made["bm25"] | baselines,
        failed=failed,
        report=str(out / "report.html"),
    )
    content = json.loads(json.dumps(result.to_dict()))
    write_whole(out / "study.json", json.dumps(content, indent=1) + "\n")
    write_report(content, out)
    return result


def _with_python_docs(config: StudyConfig, out: Path) -> StudyConfig:
    """The docstrings as a folder, so that not every cell reads the environment anew."""
    if "python-docs" not in (config.data, *config.collections):
        return config
    folder = out / "python-docs"
    if not folder.exists():
        write_collection(folder, *load_python_docs())
    names = tuple(str(folder) if name == "python-docs" else name for name in (config.data, *config.collections))
    return StudyConfig(**{f: getattr(config, f) for f in vars(config)} | {"data": names[0], "collections": names[1:]})


def _run_cells(missing: Sequence[Cell], collections: tuple[str, ...], out: Path, workers: int, progress: bool) -> dict[str, str]:
    """Run cells, several at a time; messages of those that failed."""
    failed: dict[str, str] = {}
    context = multiprocessing.get_context("spawn")
    devices = devices_of_workers(context, workers)
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(min(workers, max(1, len(missing))), context, _begin_worker, (devices, threads)) as pool:
        futures = {pool.submit(run_cell, cell, collections, out): cell for cell in missing}
        bar = tqdm(as_completed(futures), total=len(futures), desc="cells", disable=not progress, file=sys.stderr)
        for future in bar:
            try:
                future.result()
            except BrokenProcessPool as error:
                raise worker_died(out) from error
            except AnyspladeError as error:
                failed[futures[future].hash] = str(error)
                logger.warning("a cell failed (%s, %s): %s", futures[future].backbone, dict(futures[future].options), error)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return failed


def _begin_worker(devices: Any, threads: int) -> None:
    take_device(devices)
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore", FutureWarning)
    for library in ("sentence_transformers", "anysplade"):  # of so many trainings; the findings are in the cells
        logging.getLogger(library).setLevel(logging.ERROR)
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _estimate(missing: Sequence[Cell], config: StudyConfig, out: Path, loaded: Mapping[str, Collection]) -> float:
    """Seconds of all cells together: from those of the backbone that are done, or from a few steps and texts."""
    seconds: dict[str, float] = {}
    done: dict[str, list[float]] = {}
    for path in (out / "cells").glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["cell"]["options"].get("steps") == config.training.get("steps") and config.collections[0] in record["results"]:
            done.setdefault(record["cell"]["backbone"], []).append(record["seconds"])
    texts = sum(len(collection.corpus) + len(collection.queries) for collection in loaded.values())
    for backbone in {cell.backbone for cell in missing}:
        if backbone in done:
            seconds[backbone] = statistics.median(done[backbone])
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=out) as work:
            options = dict(config.training) | {"steps": _REHEARSED}
            quiet = logging.getLogger("anysplade.training.run")
            level = quiet.level
            quiet.setLevel(logging.ERROR)
            trained = train(TrainingConfig(backbone, config.data, output=f"{work}/run", **options))
            quiet.setLevel(level)
            around = time.perf_counter() - start - trained.seconds
            first = next(iter(loaded.values()))
            ids = list(first.corpus)[:_REHEARSED_TEXTS]
            queries = dict(list(first.queries.items())[:1])
            few = Collection("rehearsal", {id_: first.corpus[id_] for id_ in ids}, queries, {id_: {ids[0]: 1} for id_ in queries})
            found = evaluate(trained.model, few, METRICS[:1], depth=10)
        steps = config.training.get("steps") or trained.pairs * config.training.get("epochs", 1.0) / options.get("batch_size", 32)
        seconds[backbone] = around + steps * trained.seconds / _REHEARSED + texts * found.seconds["encoding"] / (len(ids) + 1)
    return sum(seconds[cell.backbone] for cell in missing)


def _short(record: dict[str, Any]) -> dict[str, Any]:
    """Of a cell's record what the report shows of it."""
    results = {
        name: {key: value for key, value in found.items() if key != "per_query"} for name, found in record["results"].items()
    }
    kept = ("k", "shift", "temperature", "commands", "seconds", "backbone_fingerprint", "data_hash")
    findings = [finding["name"] for finding in record["findings"]]
    provenance = {key: record["provenance"][key] for key in ("commit", "versions", "hardware")}
    return (
        {key: record[key] for key in kept}
        | {"seed": record["options"]["seed"], "results": results, "findings": findings}
        | provenance
    )
