"""One cell of a study: a backbone whose head was changed, trained with certain options, evaluated; kept by its content.

A cell's file in ``cells/`` appears when all of it is done, so that a rerun does only what is missing. What makes
a cell: the backbone's files, the training data, what was done to the head, and every option of the training.
"""

import hashlib
import json
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock
from torch import nn
from transformers import PreTrainedModel

from anysplade._common.files import whole_folder, write_whole
from anysplade._common.provenance import provenance
from anysplade.data.collections import Collection, Pair, hash_texts, load_collection
from anysplade.data.pairs import load_pairs
from anysplade.errors import ModelError, OptionError
from anysplade.evaluation.evaluations import data_hash, evaluate
from anysplade.model.calibration import ACTIVE_SHARE, MEAN_EXCESS, MEAN_EXCESS_SCALE_ONLY, sample_pairs
from anysplade.model.encoder import fingerprint
from anysplade.model.head import (
    Probe,
    describe_head,
    find_head,
    load_masked_lm,
    measure_logits,
    rescale_head,
    resolve_model,
    summarize_probe,
    untie_head,
)
from anysplade.training.config import TrainingConfig
from anysplade.training.run import train

METRICS = ("nDCG@10", "RR@10", "R@100")
COSTS = ("query_active_dims", "document_active_dims", "flops")

# What is done to a checkpoint before the training sees it.
#   untied    the decoder gets weights of its own; nothing else changes
#   scaled    W / value and b / value, untied
#   tied      W / value in place, where it is the input embeddings too; b / value
#   folded    1 / value into the LayerNorm before the decoder, b / value, W and its tie as they are
Edit = Literal["untied", "scaled", "tied", "folded"]


@dataclass(frozen=True)
class Cell:
    """What is trained and how.

    Args:
        backbone: a masked LM's folder or hub id.
        data: training examples, in any form that ``train`` takes.
        edits: what is done to the checkpoint, in order: (edit, value) pairs.
        options: of ``TrainingConfig``, with ``k``, ``shift`` and ``seed``.
        level: the share of token logits that ``shift`` is to leave above zero, in place of a number for it.
        spread_of: temperature so that the scores' standard deviation at the start is that of the head divided by this.
    """

    backbone: str
    data: str
    options: Mapping[str, Any]
    edits: tuple[tuple[Edit, float], ...] = ()
    level: float | None = None
    spread_of: float | None = None

    @property
    def hash(self) -> str:
        """Of everything that decides the numbers."""
        rule = [ACTIVE_SHARE, MEAN_EXCESS, MEAN_EXCESS_SCALE_ONLY] if "auto" in self.options.values() else None
        parts = asdict(self) | {"backbone": _fingerprint(self.backbone), "data": _data_hash(self.data), "rule": rule}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@cache
def _fingerprint(backbone: str) -> str | None:
    return fingerprint(resolve_model(backbone))


@cache
def _pairs(data: str) -> Sequence[Pair]:
    return load_pairs(data)


@cache
def _data_hash(data: str) -> str:
    return hash_texts(text for pair in _pairs(data) for text in (pair.query, pair.positive, *pair.negatives))


@cache
def read_collection(name: str) -> Collection:
    return load_collection(name)


@cache
def collection_hash(name: str) -> str:
    return data_hash(read_collection(name))


def read_anew() -> None:
    """Forget what was read of backbones, data and collections; they may have changed since."""
    for kept in (_fingerprint, _pairs, _data_hash, read_collection, collection_hash):
        kept.cache_clear()


def cell_file(out: Path, cell: Cell) -> Path:
    return out / "cells" / f"{cell.hash}.json"


def read_cell(out: Path, cell: Cell, collections: Sequence[str]) -> dict[str, Any] | None:
    """A cell's record, if it is there and was evaluated on all of these, as they are now."""
    try:
        record = json.loads(cell_file(out, cell).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    results = record["results"]
    same = all(name in results and results[name]["data_hash"] == collection_hash(name) for name in collections)
    return record if same else None


def run_cell(cell: Cell, collections: Sequence[str], out: Path) -> Path:
    """Train and evaluate a cell; interrupted and called again, its training goes on from the last checkpoint."""
    if read_cell(out, cell, collections) is not None:
        return cell_file(out, cell)
    start = time.perf_counter()
    folder = edited(cell.backbone, cell.edits, out / "backbones")
    resolved, probe, norm = _resolve(cell, folder)
    work = out / "runs" / cell.hash
    config = TrainingConfig(folder, cell.data, output=str(work), **resolved)
    trained = train(config)
    results = {}
    for name in collections:
        found = evaluate(trained.model, read_collection(name), METRICS, depth=100)
        values = {key: found.to_dict()[key] for key in (*METRICS, *COSTS, "queries", "documents", "data_hash")}
        results[name] = values | {"per_query": {id_: round(v, 6) for id_, v in found.per_query[METRICS[0]].items()}}
    k, shift = trained.calibration["k"], trained.calibration["shift"]
    record = {
        "hash": cell.hash,
        "cell": asdict(cell),
        "options": resolved,
        "k": k,
        "shift": shift,
        "temperature": config.temperature,
        "backbone_fingerprint": _fingerprint(cell.backbone),
        "data_hash": trained.data_hash,
        "before": _start(probe, norm),
        "after": _start(probe.affine(k, shift, config.bias), norm / k),
        "results": results,
        "log": [{key: entry[key] for key in ("step", "loss", "grad_norm") if key in entry} for entry in trained.log],
        "observations": trained.monitoring["observations"],
        "findings": trained.monitoring["findings"],
        "seconds": time.perf_counter() - start,
        "commands": commands(cell, resolved),
        "provenance": provenance(),
    }
    write_whole(cell_file(out, cell), json.dumps(record) + "\n")
    shutil.rmtree(work)
    return cell_file(out, cell)


def _resolve(cell: Cell, folder: str) -> tuple[dict[str, Any], Probe, float]:
    """The training's options in numbers, and what the head is like before k and shift: its logits, its mean row norm."""
    model, tokenizer = load_masked_lm(folder)
    probe = measure_logits(model, tokenizer, *sample_pairs(_pairs(cell.data), cell.options["seed"]))
    options = dict(cell.options)
    if cell.level is not None:
        options["shift"] = float(np.quantile(probe.token_logits / options["k"], 1 - cell.level))
    if cell.spread_of is not None:
        options["temperature"] = _spread(probe) / _spread(probe.affine(cell.spread_of, 0.0, "scale"))
    return options, probe, describe_head(model, None, folder).mean_row_norm


def _spread(probe: Probe) -> float:
    return summarize_probe(probe).score_std


def _start(probe: Probe, mean_row_norm: float) -> dict[str, Any]:
    found = asdict(summarize_probe(probe))
    return {key: value for key, value in found.items() if key != "histogram"} | {"mean_row_norm": mean_row_norm}


def commands(cell: Cell, options: Mapping[str, Any]) -> list[str]:
    """The command lines that train the same model."""
    backbone = cell.backbone
    made = []
    if cell.edits:
        call = f"from anysplade.study.cells import edited; print(edited({backbone!r}, {cell.edits!r}, 'backbones'))"
        made.append(shlex.join([Path(sys.executable).name, "-c", call]))
        backbone = f"backbones/{_edited_name(backbone, cell.edits)}"
    flags = [flag for name, value in options.items() for flag in _flags(name, value)]
    return [*made, shlex.join(["anysplade", "train", backbone, cell.data, "--out", "run", *flags])]


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
    """A stock checkpoint of the backbone with its head changed, made once; the backbone itself without edits.

    Raises:
        OptionError: an edit that there is not.
        ModelError: the head has no LayerNorm to fold into, or is tied in a way that cannot be kept.
    """
    if not edits:
        return backbone
    target = Path(out) / _edited_name(backbone, edits)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):  # cells that run beside this one may want the same
        if not target.exists():
            model, tokenizer = load_masked_lm(backbone)
            for edit, value in edits:
                _edit(model, edit, value)
            with whole_folder(target) as folder:
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
    return str(target)


def _edited_name(backbone: str, edits: tuple[tuple[Edit, float], ...]) -> str:
    said = "-".join(f"{edit}-{value:.6g}" for edit, value in edits)
    return f"{Path(backbone).name}-{said}-{(_fingerprint(backbone) or '')[:8]}"


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
        raise OptionError(f"{edit!r} is no edit; choose of untied, scaled, tied, folded")


def _norm_before_decoder(model: PreTrainedModel) -> nn.LayerNorm:
    """The LayerNorm whose output the decoder projects: the head's last one.

    Raises:
        ModelError: the head has none.
    """
    prefix = f"{model.base_model_prefix}."
    found = [module for name, module in model.named_modules() if isinstance(module, nn.LayerNorm) and not name.startswith(prefix)]
    if not found:
        raise ModelError(f"{type(model).__name__}: its head has no LayerNorm before the decoder to fold a scale into")
    return found[-1]
