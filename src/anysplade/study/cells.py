"""Train and evaluate a cell and store its record in ``cells/HASH.json``.

A record is written when the whole cell is done, so a rerun does only what is missing.
"""

import json
import logging
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from anysplade._common.files import write_atomic
from anysplade._common.provenance import provenance
from anysplade.evaluation.evaluations import evaluate
from anysplade.model.checkpoints import load_masked_lm
from anysplade.model.folding import fold_head
from anysplade.model.measuring import Probe, ProbeReport, describe_head, measure_logits, summarize_probe
from anysplade.study.edits import edited, edited_name
from anysplade.study.inputs import collection_hash, model_fingerprint, read_collection, read_pairs
from anysplade.study.plan import Cell
from anysplade.training.config import TrainingConfig
from anysplade.training.monitoring import Observation
from anysplade.training.run import TrainingResult, train
from anysplade.training.trainer import start_texts

logger = logging.getLogger(__name__)

METRIC = "nDCG@10"  # the main metric, by which means are compared
METRICS: tuple[str, ...] = (METRIC, "RR@10", "R@100")


@dataclass(frozen=True, kw_only=True)
class Start(ProbeReport):
    """A head on probe texts before the training; without the histogram, which is large and not shown."""

    histogram: Annotated[dict[str, list[float]], Field(exclude=True)] = field(default_factory=dict)
    mean_row_norm: float  # of the decoder's weight


@dataclass(frozen=True)
class Effectiveness:
    """The metrics on one collection, stored under their own names."""

    ndcg: Annotated[float, Field(alias=METRICS[0])]
    rr: Annotated[float, Field(alias=METRICS[1])]
    recall: Annotated[float, Field(alias=METRICS[2])]


@dataclass(frozen=True)
class Scores(Effectiveness):
    """Effectiveness and cost of a trained cell on one collection."""

    query_active_dims: float
    document_active_dims: float
    flops: float
    queries: int
    documents: int
    data_hash: str


@dataclass(frozen=True)
class QueryScores(Scores):
    """Scores with the values of single queries."""

    per_query: dict[str, float]  # main metric by query id


@dataclass(frozen=True)
class CellRecord:
    """The content of ``cells/HASH.json``."""

    hash: str
    cell: Cell
    options: dict[str, Any]  # of the training, with the numbers that ``level`` and ``spread_of`` stand for
    k: float
    shift: float
    temperature: float
    backbone_fingerprint: str | None
    data_hash: str
    before: Start  # the head without k and shift
    after: Start  # the head with k and shift
    results: dict[str, QueryScores]  # by collection
    log: list[dict[str, float]]
    observations: list[Observation]
    findings: list[dict[str, Any]]  # of the monitor
    seconds: float
    commands: list[str]
    provenance: dict[str, Any]
    training_active_dims: tuple[float, float] | None = None  # of queries and documents, on training texts; not in older records


_RECORD, _SCORES = TypeAdapter(CellRecord), TypeAdapter(QueryScores)


def cell_file(out: Path, cell: Cell) -> Path:
    return out / "cells" / f"{cell.hash}.json"


def read_record(file: Path) -> CellRecord | None:
    """Read a ``cells/HASH.json``; None if it does not exist, or, with a warning, if it is damaged."""
    try:
        return _RECORD.validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        logger.warning("%s: is damaged, or of an older version; the cell is run again", file)
        return None


def read_cell(out: Path, cell: Cell, collections: Sequence[str]) -> CellRecord | None:
    """Read a cell's record; None unless it covers the present content of all collections."""
    record = read_record(cell_file(out, cell))
    scores = record.results if record else {}
    return record if all(name in scores and scores[name].data_hash == collection_hash(name) for name in collections) else None


def read_cells(out: Path, cells: Iterable[Cell], collections: Sequence[str]) -> dict[str, CellRecord]:
    """The records of the cells that are done, by hash."""
    return {record.hash: record for cell in cells if (record := read_cell(out, cell, collections))}


def run_cell(cell: Cell, collections: Sequence[str], out: Path) -> None:
    """Train and evaluate a cell unless it is done; an interrupted training resumes from its last checkpoint."""
    if read_cell(out, cell, collections) is not None:
        return
    start = time.perf_counter()
    folder = edited(cell.backbone, cell.edits, out / "backbones")
    options, probe, norm = _resolve(cell, folder)
    work = out / "runs" / cell.hash
    config = TrainingConfig(folder, cell.data, output=str(work), **options)
    trained = train(config)
    results = {}
    for name in collections:
        evaluation = evaluate(trained.model, read_collection(name), METRICS, depth=100, max_length=trained_length(trained))
        per_query = {id_: round(value, 6) for id_, value in evaluation.per_query[METRIC].items()}
        results[name] = _SCORES.validate_python(evaluation.to_dict() | {"per_query": per_query})
    k, shift = trained.calibration["k"], trained.calibration["shift"]
    record = CellRecord(
        hash=cell.hash,
        cell=cell,
        options=options,
        k=k,
        shift=shift,
        temperature=config.temperature,
        backbone_fingerprint=model_fingerprint(cell.backbone),
        data_hash=trained.data_hash,
        before=_start(probe, norm),
        after=_start(probe.affine(k, shift, config.bias), norm / k),
        results=results,
        log=[{key: entry[key] for key in ("step", "loss", "grad_norm") if key in entry} for entry in trained.log],
        observations=[Observation(**observation) for observation in trained.monitoring["observations"]],
        findings=trained.monitoring["findings"],
        seconds=time.perf_counter() - start,
        commands=commands(cell, options),
        provenance=provenance(),
        training_active_dims=(trained.query_active_dims, trained.document_active_dims),
    )
    write_atomic(cell_file(out, cell), json.dumps(_RECORD.dump_python(record, mode="json", by_alias=True)) + "\n")
    shutil.rmtree(work)


def trained_length(trained: TrainingResult) -> int | None:
    """Tokens after which texts are cut in a cell's evaluation: as in its training, to save time."""
    return min(filter(None, (trained.config["max_length"], trained.max_seq_length)), default=None)


def _resolve(cell: Cell, folder: str) -> tuple[dict[str, Any], Probe, float]:
    """The training's options as numbers, and the head before k and shift: its logits and its mean row norm."""
    config, options = cell.config, dict(cell.options)
    model, tokenizer = load_masked_lm(folder)
    tokenizer = fold_head(model, tokenizer, config.fold, config.mute)
    probe = measure_logits(model, tokenizer, *start_texts(config, read_pairs(config)[0]))
    if cell.level is not None:
        options["shift"] = float(np.quantile(probe.token_logits / options["k"], 1 - cell.level))
    if cell.spread_of is not None:
        raw, scaled = (summarize_probe(one).score_std for one in (probe, probe.affine(cell.spread_of, 0.0, "scale")))
        options["temperature"] = raw / scaled
    return options, probe, describe_head(model, None, folder).mean_row_norm


def _start(probe: Probe, mean_row_norm: float) -> Start:
    return Start(**asdict(summarize_probe(probe)) | {"histogram": {}, "mean_row_norm": mean_row_norm})


def commands(cell: Cell, options: Mapping[str, Any]) -> list[str]:
    """The command lines that train the same model."""
    backbone = cell.backbone
    lines = []
    if cell.edits:
        call = f"from anysplade.study.cells import edited; print(edited({backbone!r}, {cell.edits!r}, 'backbones'))"
        lines.append(shlex.join([Path(sys.executable).name, "-c", call]))
        backbone = f"backbones/{edited_name(backbone, cell.edits)}"
    flags = [flag for name, value in options.items() for flag in _flags(name, value)]
    return [*lines, shlex.join(["anysplade", "train", backbone, cell.data, "--out", "run", *flags])]


def _flags(name: str, value: Any) -> list[str]:
    """An option of ``TrainingConfig`` as flags; with "=", so that a value may start with a dash."""
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, list | tuple):
        return [f"{flag}={one}" for one in value]
    if value is None:
        return [] if getattr(TrainingConfig, name) is None else [f"{flag}=none"]
    return [f"{flag}={value}"]
