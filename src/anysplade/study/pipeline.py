"""Run a whole study, from the plan to the report, or show what it would train."""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from anysplade._common.arguments import require
from anysplade._common.files import only_process, user_path, write_atomic
from anysplade._common.progress import counted, duration
from anysplade._common.provenance import provenance
from anysplade._common.tables import Tabular
from anysplade.data.collections import load_python_docs, write_collection
from anysplade.data.names import PYTHON_DOCS, is_built_in
from anysplade.errors import AnyspladeError
from anysplade.evaluation.evaluations import evaluate
from anysplade.model.checkpoints import load_masked_lm
from anysplade.model.folding import folds_by_case
from anysplade.model.measuring import describe_head
from anysplade.study.cells import METRICS, CellRecord, read_cells
from anysplade.study.conclusions import summarize
from anysplade.study.inputs import clear_caches, collection_hash, read_collection
from anysplade.study.plan import STUDIES, Cell, Name, Row, StudyConfig, plan
from anysplade.study.report import write_report
from anysplade.study.results import RowRuns, Settings, StudyResult, baseline, read_results, summarize_cell
from anysplade.study.run import default_workers, run_cells
from anysplade.study.timing import estimate, known_seconds
from anysplade.training.devices import require_one_process

logger = logging.getLogger(__name__)


def run_study(config: StudyConfig, progress: bool = False) -> StudyResult:
    """Run the missing cells of a study and write one report on all studies in the folder.

    After an interruption, call it again: finished cells are kept, and a training resumes from its last checkpoint.

    Args:
        config: the study, its backbones, data, collections and seeds.
        progress: show progress bars.

    Raises:
        OutputError: another process works in the folder.
        AnyspladeError: every cell failed, or a worker process died.
        UsageError: as in ``train`` and ``evaluate``, before the first cell.
    """
    require("config", config, StudyConfig, 'give anysplade.StudyConfig("main", output=folder)')
    require_one_process("a study is run")
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
    """A row of a study before it is run."""

    study: str
    backbone: str
    head: str  # label of the arm
    seeds: int  # number of trainings
    done: int  # number of finished trainings


@dataclass(frozen=True, repr=False)
class StudyPlan(Tabular):
    """What a study would train."""

    rows: list[PlannedRow]
    cells: int  # number of trainings; rows of several studies share them
    done: int  # number of finished trainings
    workers: int  # number of cells that run at the same time
    seconds: float | None  # time for the missing cells; None unless each of their backbones has a finished cell


def plan_study(config: StudyConfig) -> StudyPlan:
    """Show what ``run_study`` would train, row by row, and how much of it is done. Nothing is trained or written."""
    out = user_path(config.output)
    clear_caches()
    config = _with_python_docs(config, out) if (out / "python-docs").exists() else config
    for name in config.collections:
        read_collection(name)
    rows, cells = _plan(config)
    records = read_cells(out, cells.values(), config.collections)
    known, workers = known_seconds(config, out), config.workers or default_workers()
    missing = [cell.backbone for hash_, cell in cells.items() if hash_ not in records]
    seconds = sum(known[backbone] for backbone in missing) / workers if known.keys() >= set(missing) else None
    planned = [(name, row, _runs(row, records, {})) for name, study in rows.items() for row in study]
    listed = [PlannedRow(name, runs.backbone, runs.label, len(row.cells), len(runs.cells)) for name, row, runs in planned]
    return StudyPlan(listed, len(cells), len(records), workers, seconds)


def _plan(config: StudyConfig) -> tuple[dict[Name, list[Row]], dict[str, Cell]]:
    """The rows of each study, and their cells by hash."""
    norms, cased = {}, set()
    for name in config.backbones:
        model, tokenizer = load_masked_lm(name)
        norms[name] = describe_head(model, None, name).mean_row_norm
        if "folding" in config.names and folds_by_case(tokenizer):
            cased.add(name)
    rows = {name: plan(name, config, norms, cased) for name in config.names}
    return rows, {cell.hash: cell for study in rows.values() for row in study for cell in row.cells}


def _run_study(config: StudyConfig, out: Path, progress: bool) -> StudyResult:
    clear_caches()
    collections = {name: read_collection(name) for name in config.collections}
    rows, cells = _plan(config)
    earlier = read_results(out / "study.json") if (out / "study.json").exists() else StudyResult({}, {}, {}, {}, "")
    done = read_cells(out, cells.values(), config.collections)
    missing = [cell for hash_, cell in cells.items() if hash_ not in done]
    workers = config.workers or default_workers()
    if missing:
        time = duration(estimate(missing, config, out, collections) / workers)
        counts = f"{counted(len(cells), 'cell')}, {len(done)} of them done; {len(missing)} to run, {workers} at a time"
        logger.info("%s: %s, about %s", ", ".join(config.names), counts, time)
    records, failed = run_cells(list(cells.values()), config.collections, out, workers, progress)
    if not records:
        raise AnyspladeError(f"{out}: every cell failed, the first one with: {next(iter(failed.values()))}")
    bm25, unstemmed = dict(earlier.bm25), dict(earlier.unstemmed)
    for name, known in (("bm25", bm25), ("bm25-unstemmed", unstemmed)):
        for source, collection in collections.items() if name == "bm25" or "folding" in rows else ():
            if source not in known or known[source].data_hash != collection_hash(source):
                known[source] = baseline(evaluate(name, collection, METRICS, depth=100))
    settings = Settings(**{field.name: getattr(config, field.name) for field in fields(Settings)})
    studies = {
        name: summarize(name, [_runs(row, records, failed) for row in study], records, settings, provenance(), bm25)
        for name, study in rows.items()
    }
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
    messages = [failed[hash_] for hash_ in hashes if hash_ in failed]
    return RowRuns(**vars(row) | {"cells": [hash_ for hash_ in hashes if hash_ in records], "failed": messages})


def _with_python_docs(config: StudyConfig, out: Path) -> StudyConfig:
    """Replace python-docs by a folder, because reading the installed packages again for each cell takes seconds."""
    if not any(is_built_in(name, PYTHON_DOCS) for name in (config.data, *config.collections)):
        return config
    folder = out / "python-docs"
    if not folder.exists():
        write_collection(folder, *load_python_docs())
    data, *collections = (str(folder) if name == PYTHON_DOCS else name for name in (config.data, *config.collections))
    return replace(config, data=data, collections=tuple(collections))
