"""Run a study or any list of cells: in parallel processes, only what is missing, and again after an interruption."""

import json
import logging
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from anysplade._common.arguments import require
from anysplade._common.files import only_process, user_path, write_atomic
from anysplade._common.progress import bar, counted, duration
from anysplade._common.provenance import provenance
from anysplade._common.workers import devices_of_workers, take_device
from anysplade.data.collections import Collection, load_python_docs, write_collection
from anysplade.data.names import PYTHON_DOCS, is_built_in
from anysplade.errors import AnyspladeError, worker_died
from anysplade.evaluation.evaluations import evaluate
from anysplade.model.checkpoints import load_masked_lm
from anysplade.model.folding import folds_by_case
from anysplade.model.measuring import describe_head
from anysplade.study.cells import (
    METRICS,
    Cell,
    CellRecord,
    clear_caches,
    collection_hash,
    read_cell,
    read_collection,
    read_record,
    run_cell,
    trained_length,
)
from anysplade.study.conclusions import summarize
from anysplade.study.plan import STUDIES, Name, Row, StudyConfig, plan
from anysplade.study.report import write_report
from anysplade.study.results import RowRuns, Settings, StudyResult, baseline, read_results, summarize_cell
from anysplade.training.config import TrainingConfig
from anysplade.training.run import train

logger = logging.getLogger(__name__)

_REHEARSED = 4  # steps that are timed before a study of a new backbone
_REHEARSED_TEXTS = 100


def run_study(config: StudyConfig, progress: bool = False) -> StudyResult:
    """Run the missing cells of a study, and write one report on all studies in the folder.

    Args:
        config: the study, its backbones, data, collections and seeds.

    After an interruption call it again: finished cells are kept, and a training resumes from its last checkpoint.

    Raises:
        OutputError: another process works in the folder.
        AnyspladeError: every cell failed, or a worker process died.
        UsageError: as ``train`` and ``evaluate`` do, before the first cell.
    """
    require("config", config, StudyConfig, 'give anysplade.StudyConfig("main", output=folder)')
    out = user_path(config.output)
    new = not out.exists()
    with only_process(out):
        try:
            return _run_study(_with_python_docs(config, out), out, progress)
        except AnyspladeError:
            if new and not (out / "cells").exists():  # an error before the first cell leaves no folder behind
                shutil.rmtree(out)
            raise


@dataclass(frozen=True)
class PlannedRow:
    """A row of a study, before it is run."""

    study: str
    backbone: str
    head: str  # the label of the arm
    seeds: int  # trainings, one a cell
    done: int  # of them


@dataclass(frozen=True)
class StudyPlan:
    """What a study would train."""

    rows: list[PlannedRow]
    cells: int  # trainings; rows of several studies share them
    done: int  # of them
    workers: int  # cells at a time
    seconds: float | None  # of the cells to run; None if no cell of a backbone is done to go by

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan_study(config: StudyConfig) -> StudyPlan:
    """What ``run_study`` would train, row by row, and how much of it is done already; nothing is trained or written.

    Args:
        config: the study, its backbones, data, collections and seeds.

    Raises:
        UsageError: a backbone, the data or a collection cannot be read.
    """
    out = user_path(config.output)
    clear_caches()
    config = _with_python_docs(config, out) if (out / "python-docs").exists() else config
    for name in config.collections:
        read_collection(name)
    rows = _plan(config)
    cells = _cells(rows)
    records = {hash_: record for hash_, cell in cells.items() if (record := read_cell(out, cell, config.collections))}
    known = _known_seconds(config, out)
    missing = [cell for hash_, cell in cells.items() if hash_ not in records]
    timed = all(cell.backbone in known for cell in missing)
    workers = config.workers or _default_workers()
    planned = [(name, row, _runs(row, records, {})) for name, study in rows.items() for row in study]
    return StudyPlan(
        rows=[PlannedRow(name, runs.backbone, runs.label, len(row.cells), len(runs.cells)) for name, row, runs in planned],
        cells=len(cells),
        done=len(records),
        workers=workers,
        seconds=sum(known[cell.backbone] for cell in missing) / workers if timed else None,
    )


def _plan(config: StudyConfig) -> dict[Name, list[Row]]:
    """The rows of each study."""
    norms, cased = {}, set()
    for name in config.backbones:
        model, tokenizer = load_masked_lm(name)
        norms[name] = describe_head(model, None, name).mean_row_norm
        if "folding" in config.names and folds_by_case(tokenizer):
            cased.add(name)
    return {name: plan(name, config, norms, cased) for name in config.names}


def _cells(rows: Mapping[Name, Sequence[Row]]) -> dict[str, Cell]:
    """The cells of all rows by hash."""
    return {cell.hash: cell for study in rows.values() for row in study for cell in row.cells}


def _run_study(config: StudyConfig, out: Path, progress: bool) -> StudyResult:
    clear_caches()
    loaded = {name: read_collection(name) for name in config.collections}
    rows = _plan(config)
    earlier = read_results(out / "study.json") if (out / "study.json").exists() else StudyResult({}, {}, {}, {}, "")
    cells = _cells(rows)
    missing = [cell for cell in cells.values() if read_cell(out, cell, config.collections) is None]
    workers = config.workers or _default_workers()
    if missing:
        seconds = _estimate(missing, config, out, loaded)
        counts = (
            f"{counted(len(cells), 'cell')}, {len(cells) - len(missing)} of them done; {len(missing)} to run, {workers} at a time"
        )
        logger.info("%s: %s, about %s", ", ".join(config.names), counts, duration(seconds / workers))
    records, failed = run_cells(list(cells.values()), config.collections, out, workers, progress)
    if not records:
        raise AnyspladeError(f"{out}: every cell failed, the first one with: {next(iter(failed.values()))}")
    settings = Settings(**{field.name: getattr(config, field.name) for field in fields(Settings)})
    studies = {
        name: summarize(name, [_runs(row, records, failed) for row in study], records, settings, provenance())
        for name, study in rows.items()
    }
    bm25, unstemmed = dict(earlier.bm25), dict(earlier.unstemmed)
    for kind, known in (("bm25", bm25), ("bm25-unstemmed", unstemmed)):
        for source, collection in loaded.items() if kind == "bm25" or "folding" in rows else ():
            if source not in known or known[source].data_hash != collection_hash(source):
                known[source] = baseline(evaluate(kind, collection, METRICS, depth=100))
    result = StudyResult(
        studies=dict(sorted((earlier.studies | studies).items(), key=lambda item: STUDIES.index(item[0]))),
        cells=earlier.cells | {hash_: summarize_cell(record) for hash_, record in records.items()},
        bm25=bm25,
        unstemmed=unstemmed,
        failed=failed,
        report=str(out / "report.html"),
    )
    write_atomic(out / "study.json", json.dumps(result.to_dict(), indent=1) + "\n")
    write_report(result, out)
    return result


def _runs(row: Row, records: Mapping[str, CellRecord], failed: Mapping[str, str]) -> RowRuns:
    hashes = [cell.hash for cell in row.cells]
    cells, messages = [hash_ for hash_ in hashes if hash_ in records], [failed[hash_] for hash_ in hashes if hash_ in failed]
    return RowRuns(**vars(row) | {"cells": cells, "failed": messages})


def _with_python_docs(config: StudyConfig, out: Path) -> StudyConfig:
    """The config with python-docs as a folder: reading the installed packages again for each cell takes seconds."""
    if not any(is_built_in(name, PYTHON_DOCS) for name in (config.data, *config.collections)):
        return config
    folder = out / "python-docs"
    if not folder.exists():
        write_collection(folder, *load_python_docs())
    data, *collections = (str(folder) if name == "python-docs" else name for name in (config.data, *config.collections))
    return replace(config, data=data, collections=tuple(collections))


def run_cells(
    cells: Sequence[Cell], collections: Sequence[str], out: Path, workers: int | None = None, progress: bool = False
) -> tuple[dict[str, CellRecord], dict[str, str]]:
    """Run the cells that are missing in a folder, several at a time.

    Args:
        collections: what each cell is evaluated on.
        out: the folder; records lie in ``cells/``.
        workers: processes; by default one for each GPU, or for each core.

    Returns:
        The records of the cells, and the messages of those that failed, by hash.

    Raises:
        AnyspladeError: a worker process died.
    """
    wanted = {cell.hash: cell for cell in cells}
    missing = [cell for cell in wanted.values() if read_cell(out, cell, collections) is None]
    failed = _run_missing(missing, collections, out, workers or _default_workers(), progress) if missing else {}
    records = {hash_: record for hash_, cell in wanted.items() if (record := read_cell(out, cell, collections))}
    return records, failed


def _default_workers() -> int:
    return torch.cuda.device_count() or os.cpu_count() or 1


def _run_missing(missing: Sequence[Cell], collections: Sequence[str], out: Path, workers: int, progress: bool) -> dict[str, str]:
    """Run cells; returns the messages of those that failed."""
    failed: dict[str, str] = {}
    context = multiprocessing.get_context("spawn")
    devices = devices_of_workers(context, workers)
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(min(workers, len(missing)), context, _begin_worker, (devices, threads)) as pool:
        futures = {pool.submit(run_cell, cell, collections, out): cell for cell in missing}
        with bar("cells", "cell", len(futures), progress) as shown:
            for future in as_completed(futures):
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
                shown.update()
    return failed


def _begin_worker(devices: Any, threads: int) -> None:
    take_device(devices)
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore", FutureWarning)
    for library in ("sentence_transformers", "anysplade"):  # of many trainings at once; the findings are in the records
        logging.getLogger(library).setLevel(logging.ERROR)
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _known_seconds(config: StudyConfig, out: Path) -> dict[str, float]:
    """What a finished cell of each backbone took, the median."""
    done: dict[str, list[float]] = {}
    for path in (out / "cells").glob("*.json"):
        record = read_record(path)
        if record and record.options.get("steps") == config.training.get("steps") and config.collections[0] in record.results:
            done.setdefault(record.cell.backbone, []).append(record.seconds)
    return {backbone: statistics.median(seconds) for backbone, seconds in done.items()}


def _estimate(missing: Sequence[Cell], config: StudyConfig, out: Path, loaded: Mapping[str, Collection]) -> float:
    """Seconds for all cells, one after the other: from finished cells of the same backbone, or from a timed rehearsal."""
    seconds = _known_seconds(config, out)
    texts = sum(len(collection.corpus) + len(collection.queries) for collection in loaded.values())
    for backbone in {cell.backbone for cell in missing} - seconds.keys():
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=out) as work:
            options = {**config.training, "steps": _REHEARSED}
            training_logger = logging.getLogger("anysplade.training")
            level = training_logger.level
            training_logger.setLevel(logging.ERROR)
            trained = train(TrainingConfig(backbone, config.data, output=f"{work}/run", **options))
            training_logger.setLevel(level)
            overhead = time.perf_counter() - start - trained.seconds
            first = next(iter(loaded.values()))
            corpus = dict(list(first.corpus.items())[:_REHEARSED_TEXTS])
            queries = dict(list(first.queries.items())[:1])
            qrels = {query_id: {next(iter(corpus)): 1} for query_id in queries}
            rehearsal = Collection("rehearsal", corpus, queries, qrels)
            evaluation = evaluate(trained.model, rehearsal, METRICS[:1], depth=10, max_length=trained_length(trained))
        steps = config.training.get("steps") or trained.pairs * config.training.get("epochs", 1.0) / options.get("batch_size", 32)
        encoding = texts * evaluation.seconds["encoding"] / (len(corpus) + 1)
        seconds[backbone] = overhead + steps * trained.seconds / _REHEARSED + encoding
    return sum(seconds[cell.backbone] for cell in missing)
