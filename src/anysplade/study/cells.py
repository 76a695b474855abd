"""One cell of an experiment: a backbone whose head is edited, trained with some options, and evaluated.

A cell's record is the file ``cells/HASH.json``. It is written when all of the cell is done, so a rerun does only what is
missing. The hash covers every option of the training, given or default, the edits of the head, and the content of what the
options name: the backbone, the examples with their texts and negatives, the teacher and the dev collection.
"""

import json
import logging
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
from filelock import FileLock
from pydantic import Field, TypeAdapter, ValidationError
from torch import nn
from transformers import PreTrainedModel

from anysplade._common.files import atomic_folder, make_folder, write_atomic
from anysplade._common.hashing import DataHash
from anysplade._common.provenance import provenance
from anysplade.data.collections import Collection, Pair, data_hash, load_collection
from anysplade.errors import ModelError, OptionError
from anysplade.evaluation.evaluations import evaluate
from anysplade.model.calibration import ACTIVE_SHARE, FEWEST_TERMS, MEAN_EXCESS, MEAN_EXCESS_SCALE_ONLY
from anysplade.model.checkpoints import load_masked_lm
from anysplade.model.folding import fold_head
from anysplade.model.head import find_head, untie_head
from anysplade.model.measuring import Probe, ProbeReport, describe_head, measure_logits, summarize_probe
from anysplade.model.rescaling import rescale_head
from anysplade.model.saved import fingerprint, resolve_model
from anysplade.training.config import TrainingConfig
from anysplade.training.inputs import read_examples
from anysplade.training.monitoring import Observation
from anysplade.training.run import TrainingResult, train
from anysplade.training.trainer import start_texts

logger = logging.getLogger(__name__)

METRIC = "nDCG@10"  # the one that means are compared by
METRICS: tuple[str, ...] = (METRIC, "RR@10", "R@100")

# A change of a checkpoint before the training.
#   untied    the decoder gets weights of its own; nothing else changes
#   scaled    W / value and b / value, untied
#   tied      W / value in place, where W is also the input embeddings; b / value
#   folded    1 / value into the LayerNorm before the decoder, b / value; W and its tie stay
Edit = Literal["untied", "scaled", "tied", "folded"]


@dataclass(frozen=True)
class Cell:
    """A training and its evaluation.

    Args:
        backbone: a masked LM's folder or hub id.
        data: training examples, in any form that ``train`` takes.
        options: of ``TrainingConfig``, with ``k``, ``shift`` and ``seed``.
        edits: changes of the checkpoint, in order: (edit, value) pairs.
        level: the share of token logits above zero at the start; replaces the number in ``shift``.
        spread_of: sets the temperature so that the scores' standard deviation at the start is that of the head divided by this.
    """

    backbone: str
    data: str
    options: Mapping[str, Any]
    edits: tuple[tuple[Edit, float], ...] = ()
    level: float | None = None
    spread_of: float | None = None

    @property
    def config(self) -> TrainingConfig:
        """Every option of the training, with the backbone as it was before the edits."""
        return TrainingConfig(self.backbone, self.data, output="", **self.options)

    @property
    def hash(self) -> str:
        """Of everything that decides the numbers."""
        config = self.config
        options = asdict(config)
        for name in ("output", "report_to", "texts", "dev_split"):  # they decide nothing, or what they name is hashed with the rest
            del options[name]
        options |= {
            "backbone": _fingerprint(config.backbone) or config.backbone,
            "data": _data_hash(*_names(config)),
            "teacher": config.teacher and (_fingerprint(config.teacher) or config.teacher),
            "dev": config.dev and collection_hash(config.dev, config.dev_split),
        }
        calibrated = "auto" in (config.k, config.shift) or config.on_collapse == "recalibrate"
        rule = [ACTIVE_SHARE, MEAN_EXCESS, MEAN_EXCESS_SCALE_ONLY, FEWEST_TERMS] if calibrated else None
        return DataHash([sorted(options.items()), self.edits, self.level, self.spread_of, rule]).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Start(ProbeReport):
    """A head on probe texts before the training, without the histogram, which is large and not shown."""

    histogram: Annotated[dict[str, list[float]], Field(exclude=True)] = field(default_factory=dict)
    mean_row_norm: float  # of the decoder's weight


@dataclass(frozen=True)
class Scores:
    """A trained cell on one collection: effectiveness and cost."""

    ndcg: Annotated[float, Field(alias=METRICS[0])]
    rr: Annotated[float, Field(alias=METRICS[1])]
    recall: Annotated[float, Field(alias=METRICS[2])]
    query_active_dims: float
    document_active_dims: float
    flops: float
    queries: int
    documents: int
    data_hash: str


@dataclass(frozen=True)
class QueryScores(Scores):
    """With the main metric of each query, by id."""

    per_query: dict[str, float]


@dataclass(frozen=True)
class CellRecord:
    """The content of ``cells/HASH.json``."""

    hash: str
    cell: Cell
    options: dict[str, Any]  # of the cell, with numbers for ``level`` and ``spread_of``
    k: float
    shift: float
    temperature: float
    backbone_fingerprint: str | None
    data_hash: str
    before: Start  # the head without k and shift
    after: Start  # and with them
    results: dict[str, QueryScores]  # by collection
    log: list[dict[str, float]]
    observations: list[Observation]
    findings: list[dict[str, Any]]  # of the monitor
    seconds: float
    commands: list[str]
    provenance: dict[str, Any]
    training_active_dims: tuple[float, float] | None = None  # of queries and documents, on training texts; not in older records


_RECORD, _SCORES = TypeAdapter(CellRecord), TypeAdapter(QueryScores)


@cache
def _fingerprint(model: str) -> str | None:
    return fingerprint(resolve_model(model))


def _names(config: TrainingConfig) -> tuple[str, str | None, int | None, str | None]:
    """The options that decide which examples are read."""
    return config.data, config.texts, config.negatives, config.teacher


@cache
def _pairs(data: str, texts: str | None, negatives: int | None, teacher: str | None) -> Sequence[Pair]:
    return list(read_examples(TrainingConfig("", data, output="", texts=texts, negatives=negatives, teacher=teacher))[0])


@cache
def _data_hash(data: str, texts: str | None, negatives: int | None, teacher: str | None) -> str:
    return DataHash(_pairs(data, texts, negatives, teacher)).hexdigest()


@cache
def read_collection(name: str, split: str = "test") -> Collection:
    """``load_collection``, once in a process."""
    return load_collection(name, split)


@cache
def collection_hash(name: str, split: str = "test") -> str:
    """Of a collection's content."""
    return data_hash(read_collection(name, split))


def clear_caches() -> None:
    """Forget the backbones, data and collections that were read: their files may have changed."""
    for cached in (_fingerprint, _pairs, _data_hash, read_collection, collection_hash):
        cached.cache_clear()


def cell_file(out: Path, cell: Cell) -> Path:
    """Where the record of a cell lies in a folder of cells."""
    return out / "cells" / f"{cell.hash}.json"


def read_record(file: Path) -> CellRecord | None:
    """Read a ``cells/HASH.json``; None if there is none, or, with a warning, if it is damaged."""
    try:
        return _RECORD.validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        logger.warning("%s: is damaged, or of an older version; the cell is run again", file)
        return None


def read_cell(out: Path, cell: Cell, collections: Sequence[str]) -> CellRecord | None:
    """A cell's record, if there is one and it covers all of these collections with their present content."""
    record = read_record(cell_file(out, cell))
    if record is None:
        return None
    same = all(name in record.results and record.results[name].data_hash == collection_hash(name) for name in collections)
    return record if same else None


def run_cell(cell: Cell, collections: Sequence[str], out: Path) -> None:
    """Train and evaluate a cell. After an interruption its training resumes from the last checkpoint."""
    if read_cell(out, cell, collections) is not None:
        return
    start = time.perf_counter()
    folder = edited(cell.backbone, cell.edits, out / "backbones")
    resolved, probe, norm = _resolve(cell, folder)
    work = out / "runs" / cell.hash
    config = TrainingConfig(folder, cell.data, output=str(work), **resolved)
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
        options=resolved,
        k=k,
        shift=shift,
        temperature=config.temperature,
        backbone_fingerprint=_fingerprint(cell.backbone),
        data_hash=trained.data_hash,
        before=_start(probe, norm),
        after=_start(probe.affine(k, shift, config.bias), norm / k),
        results=results,
        log=[{key: entry[key] for key in ("step", "loss", "grad_norm") if key in entry} for entry in trained.log],
        observations=[Observation(**observation) for observation in trained.monitoring["observations"]],
        findings=trained.monitoring["findings"],
        seconds=time.perf_counter() - start,
        commands=commands(cell, resolved),
        provenance=provenance(),
        training_active_dims=(trained.query_active_dims, trained.document_active_dims),
    )
    write_atomic(cell_file(out, cell), json.dumps(_RECORD.dump_python(record, mode="json", by_alias=True)) + "\n")
    shutil.rmtree(work)


def trained_length(trained: TrainingResult) -> int | None:
    """Tokens to which a cell's texts are cut in its evaluation: as in its training, so that a cell takes no longer than it must."""
    return min(filter(None, (trained.config["max_length"], trained.max_seq_length)), default=None)


def _resolve(cell: Cell, folder: str) -> tuple[dict[str, Any], Probe, float]:
    """The training's options in numbers, and the head before k and shift: its logits and its mean row norm."""
    config, options = cell.config, dict(cell.options)
    model, tokenizer = load_masked_lm(folder)
    tokenizer = fold_head(model, tokenizer, config.fold, config.mute)
    probe = measure_logits(model, tokenizer, *start_texts(config, _pairs(*_names(config))))
    if cell.level is not None:
        options["shift"] = float(np.quantile(probe.token_logits / options["k"], 1 - cell.level))
    if cell.spread_of is not None:
        options["temperature"] = _spread(probe) / _spread(probe.affine(cell.spread_of, 0.0, "scale"))
    return options, probe, describe_head(model, None, folder).mean_row_norm


def _spread(probe: Probe) -> float:
    return summarize_probe(probe).score_std


def _start(probe: Probe, mean_row_norm: float) -> Start:
    return Start(**asdict(summarize_probe(probe)) | {"histogram": {}, "mean_row_norm": mean_row_norm})


def commands(cell: Cell, options: Mapping[str, Any]) -> list[str]:
    """The command lines that train the same model."""
    backbone = cell.backbone
    lines = []
    if cell.edits:
        call = f"from anysplade.study.cells import edited; print(edited({backbone!r}, {cell.edits!r}, 'backbones'))"
        lines.append(shlex.join([Path(sys.executable).name, "-c", call]))
        backbone = f"backbones/{_edited_name(backbone, cell.edits)}"
    flags = [flag for name, value in options.items() for flag in _flags(name, value)]
    return [*lines, shlex.join(["anysplade", "train", backbone, cell.data, "--out", "run", *flags])]


def _flags(name: str, value: Any) -> list[str]:
    """An option of ``TrainingConfig`` as the command line takes it; a value that starts with a dash stays one."""
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, list | tuple):
        return [f"{flag}={one}" for one in value]
    if value is None:
        return [] if getattr(TrainingConfig, name) is None else [f"{flag}=none"]
    return [f"{flag}={value}"]


# ------------------------------------------------------------------------------------- edited heads


def edited(backbone: str, edits: tuple[tuple[Edit, float], ...], out: str | Path) -> str:
    """The folder of a stock checkpoint of the backbone with its head edited, written once; the backbone itself without edits.

    Raises:
        OptionError: an unknown edit.
        ModelError: the head has no LayerNorm to fold into.
    """
    if not edits:
        return backbone
    target = Path(out) / _edited_name(backbone, edits)
    make_folder(target.parent)
    with FileLock(target.with_name(f".{target.name}.lock")):  # other cells may need the same folder now
        if not target.exists():
            model, tokenizer = load_masked_lm(backbone)
            for edit, value in edits:
                _edit(model, edit, value)
            with atomic_folder(target) as folder:
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
    return str(target)


def _edited_name(backbone: str, edits: tuple[tuple[Edit, float], ...]) -> str:
    names = "-".join(f"{edit}-{value:.6g}" for edit, value in edits)
    return f"{Path(backbone).name}-{names}-{(_fingerprint(backbone) or '')[:8]}"


@torch.no_grad()
def _edit(model: PreTrainedModel, edit: Edit, value: float) -> None:
    if edit == "scaled":
        rescale_head(model, k=value)
    elif edit == "untied":
        untie_head(model)
    elif edit == "tied":
        head = find_head(model)
        for tensor in (head.decoder.weight, *head.biases):
            tensor /= value
    elif edit == "folded":
        norm = _norm_before_decoder(model)
        for tensor in (norm.weight, norm.bias, *find_head(model).biases):
            if tensor is not None:
                tensor /= value
    else:
        raise OptionError(f"{edit!r} is not an edit; choose one of {', '.join(get_args(Edit))}")


def _norm_before_decoder(model: PreTrainedModel) -> nn.LayerNorm:
    """The LayerNorm whose output the decoder projects: the head's last one.

    Raises:
        ModelError: there is none.
    """
    prefix = f"{model.base_model_prefix}."
    norms = [module for name, module in model.named_modules() if isinstance(module, nn.LayerNorm) and not name.startswith(prefix)]
    if not norms:
        raise ModelError(f"{type(model).__name__}: its head has no LayerNorm before the decoder to fold a scale into")
    return norms[-1]
