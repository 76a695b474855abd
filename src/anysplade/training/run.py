"""Train a sparse encoder with sentence-transformers' trainer, from one config.

The output folder contains ``model`` (the trained ``SparseEncoder``), ``checkpoints`` (each a ``SparseEncoder`` too), ``run.json``
(options and calibration, written before the first step) and ``training.json`` (the result).
"""

import gc
import json
import logging
import os
import shutil
import time
from contextlib import nullcontext
from dataclasses import MISSING, asdict, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml
from sentence_transformers import SparseEncoder, SparseEncoderTrainer
from sentence_transformers import SparseEncoderTrainingArguments as Arguments

from anysplade._common.arguments import require
from anysplade._common.files import atomic_folder, only_process, user_path, write_atomic, writing
from anysplade._common.outputs import digests, earlier_call, is_whole, read_record, require_unused, restored, write_record
from anysplade._common.progress import begin
from anysplade._common.provenance import provenance
from anysplade._common.tables import Tabular
from anysplade.errors import AnyspladeError, CollapseError, OutputError
from anysplade.model.encoder import is_saved_encoder
from anysplade.model.modules import set_lengths, splade_modules
from anysplade.model.saved import resolve_model
from anysplade.training.callbacks import check_trackers, last_checkpoint, step_of
from anysplade.training.card import CARD_FILES, write_card
from anysplade.training.config import TrainingConfig
from anysplade.training.devices import more_gpus
from anysplade.training.inputs import DATA, Inputs, batch_teacher, input_files, read_inputs
from anysplade.training.level import sample_statistics, trim_level, warn_of_missed_targets
from anysplade.training.monitoring import Monitor, renamed_findings
from anysplade.training.steps import matrix_products
from anysplade.training.trainer import make_trainer, start_encoder, training_arguments

logger = logging.getLogger(__name__)

_OPTIONS = "options.yaml"  # file in the output with all options, as ``anysplade train --config`` reads them
_RESTARTS = 3  # at most, with on_collapse="recalibrate"


@dataclass(frozen=True, repr=False)
class TrainingResult(Tabular):
    """Result of a finished run, stored in ``training.json``."""

    model: str  # folder of the trained encoder
    config: dict[str, Any]  # all options
    calibration: dict[str, Any]  # a ``Calibration`` as JSON
    pairs: int  # number of training examples
    data_hash: str  # SHA-256 of the examples
    processes: int  # number of processes that trained together
    steps: int  # optimizer steps
    best_step: int | None  # step of the kept model, with a dev collection
    resumed_from: int  # step at which this process started; 0 unless the run was interrupted
    seconds: float  # training time in this process
    query_active_dims: float  # mean of the finished model, over up to 200 training pairs
    document_active_dims: float  # the same for documents
    level_trim: float  # subtracted from the decoder's bias after the last step, to meet a target of active dims
    dev: dict[str, Any] | None  # effectiveness and cost of the finished model on the dev collection
    log: list[dict[str, float]]  # the trainer's own log: loss, its parts, learning rate
    monitoring: dict[str, Any]  # findings (what went wrong) and observations (statistics of the batches' vectors)
    restarts: list[dict[str, Any]]  # calibration and findings of the attempts that collapsed
    provenance: dict[str, Any]  # versions, commit, hardware, command
    ranking_loss: dict[str, dict[str, float]] | None = None  # mean over the first and the last tenth of the steps
    max_seq_length: int | None = None  # tokens of a document that the finished model reads
    query_own_words: float | None = None  # share of their own words that queries keep, by idf, over the sample of the active dims
    document_own_words: float | None = None  # the same for documents
    matrix_products: str | None = None  # their format in training: bfloat16, tf32 or float32; older records lack it


@dataclass
class _Attempt:
    """One training of the encoder from one calibration of its head."""

    encoder: SparseEncoder
    lengths: list[int]  # token limits of the finished encoder, for ``set_lengths``
    trainer: SparseEncoderTrainer
    monitor: Monitor
    resumed_from: int  # step
    seconds: float


def train(config: TrainingConfig, progress: bool = False) -> TrainingResult:
    """Train a SPLADE encoder.

    An interrupted run continues from the last undamaged checkpoint when it is called again with the same config. A finished run
    returns the stored result if the data, the dev collection and the models are unchanged. Damaged files in the output are
    reported and made again. Processes that ``torchrun`` starts train one model together and share each batch.

    Args:
        config: all options; ``config.output`` is the run's folder.
        progress: show progress bars.

    Raises:
        OutputError: the output folder has another run or other content, the inputs changed, another process trains in it, or the
            disk is full.
        ModelError, DataError, OptionError: the models, the data or the options cannot be used; raised before the first step.
        CollapseError: the run collapsed with ``on_collapse="stop"``, or all restarts collapsed too.
    """
    require("config", config, TrainingConfig, "give anysplade.TrainingConfig(backbone, data, output=folder)")
    announced = (_label(config), more_gpus(config.batch_size, user_path(config.output) / _OPTIONS))
    return train_as(config, progress, "\n".join(filter(None, announced)))


def _label(config: TrainingConfig) -> str:
    """What is trained, and the options that differ from the defaults."""
    defaults = {field.name: field.default for field in fields(config) if field.default is not MISSING}
    chosen = [f"{name} {getattr(config, name)}" for name, default in defaults.items() if getattr(config, name) != default]
    options = f" with {', '.join(chosen)}" if chosen else ""
    return f"training {config.backbone} on {config.data}{options}; {user_path(config.output) / _OPTIONS} has all options"


def train_as(config: TrainingConfig, progress: bool, label: str) -> TrainingResult:
    """``train``; ``label`` announces the training in the log."""
    check_trackers(config.report_to)
    if config.dev is not None:
        import_module("anysplade.evaluation.evaluations")  # a missing extra is an error before hours of training
    output = user_path(config.output)
    with only_process(output) if os.environ.get("RANK", "0") == "0" else nullcontext():
        return _train(config, output, progress, label)


def _train(config: TrainingConfig, output: Path, progress: bool, label: str) -> TrainingResult:
    """``train``, in a folder that no other run writes to."""
    arguments = training_arguments(config, output)
    is_first = arguments.process_index == 0
    with arguments.main_process_first(local=False):
        known, result = _earlier_run(config, output)
        files = input_files(config, output)
        if result is not None:
            if known.get("files") != files:
                _check_inputs_again(config, output, known | {"files": files}, arguments, progress)
            logger.info("%s already has this run's result", output)
            return result
        inputs = read_inputs(config, output, arguments, progress)
        _require_unchanged(config, output, known, inputs)
        if is_first and not known:  # remove what a call with other inputs left
            shutil.rmtree(output / "checkpoints", ignore_errors=True)
            shutil.rmtree(output / DATA / "teacher", ignore_errors=True)
        inputs.teacher = batch_teacher(config, output, inputs.pairs, arguments.process_index, progress)
    logger.info("%s", label)
    run = {"config": _as_json(config), "hashes": inputs.hashes, "files": files, "restarts": known.get("restarts", [])}
    while (attempt := _attempt(config, output, run, inputs, arguments, progress)).monitor.collapsed:
        if config.on_collapse == "warn":
            break
        with arguments.main_process_first(local=False):
            _record_collapse(config, output, run, attempt.monitor, is_first)
        del attempt
        gc.collect()  # its parts refer to each other, and the next attempt needs the memory
    state = attempt.trainer.state
    if state.global_step < state.max_steps and config.patience is None:  # batches ran out, of which the trainer says nothing
        raise AnyspladeError(f"{output}: the training ended at step {state.global_step} of {state.max_steps}; no model was written")
    if is_first:
        _save(output, run, attempt.encoder, _measured(config, output, run, inputs, attempt, progress))
    if arguments.world_size > 1:
        torch.distributed.barrier()
    result = _stored_result(output)
    assert result is not None  # the first process has just written it
    return result


# ---------------------------------------------------------------------------- earlier calls


def _earlier_run(config: TrainingConfig, output: Path) -> tuple[dict[str, Any], TrainingResult | None]:
    """What is recorded of this run, {} for a new one, and its result if it is finished and the model is undamaged."""
    if not (output / "run.json").exists():
        require_unused(output, DATA, "lock")
        return {}, None
    asked = {"config": _as_json(config)}
    defaults = {field.name: field.default for field in fields(config) if field.default is not MISSING}
    run = earlier_call(output / "run.json", asked, defaults=defaults)
    if run is None:
        known = earlier_call(output / "training.json", asked, defaults=defaults)
        what = (
            "the run starts again from the beginning"
            if known is None
            else f"{output / 'model'} cannot be checked; it is made again"
        )
        logger.warning("%s: %s", output, what)
        return known or {}, None
    if "collapsed" in run:
        raise CollapseError(f"{output}: this run collapsed before; change the options and choose another `output`")
    result = _stored_result(output)
    if result is not None and not is_whole(output / "model", run.get("model", {})):  # older versions stored no digests
        result = None
    return run, result


def _as_json(config: TrainingConfig) -> dict[str, Any]:
    return dict(json.loads(json.dumps(asdict(config))))


def _stored_result(output: Path) -> TrainingResult | None:
    record = read_record(output / "training.json", *(field.name for field in fields(TrainingResult) if field.default is MISSING))
    if record is None:
        return None
    for part in (record["monitoring"], *record["restarts"]):
        part["findings"] = renamed_findings(part["findings"])
    return restored(TrainingResult, record)


def _check_inputs_again(config: TrainingConfig, output: Path, run: dict[str, Any], arguments: Arguments, progress: bool) -> None:
    """Check the contents of a finished run's inputs, whose files have changed, and record the new files."""
    inputs = read_inputs(config, output, arguments, progress)
    shutil.rmtree(output / DATA)
    _require_unchanged(config, output, run, inputs)
    write_record(output / "run.json", run | {"hashes": inputs.hashes})


def _require_unchanged(config: TrainingConfig, output: Path, known: dict[str, Any], inputs: Inputs) -> None:
    """Raise OutputError if an input is not the one that the run began with."""
    hashes = known.get("hashes", {"data": known.get("data_hash", inputs.hashes["data"])})  # the latter in older runs
    changed = next((name for name, value in hashes.items() if value != inputs.hashes[name]), None)
    if changed is not None:
        what = {"data": "training data", "dev": "dev collection"}.get(changed, changed)
        raise OutputError(
            f"{output}: the {what} changed since this run began ({getattr(config, changed)}); choose another `output`, which a run "
            "of an older version needs too"
        )


# ---------------------------------------------------------------------------- attempts


def _attempt(
    config: TrainingConfig, output: Path, run: dict[str, Any], inputs: Inputs, arguments: Arguments, progress: bool
) -> _Attempt:
    """Calibrate the head, write ``run.json`` and train, from the last checkpoint if there is one."""
    begin(f"probing the head of {config.backbone}", progress and not is_saved_encoder(resolve_model(config.backbone)))
    encoder, calibration, lengths = start_encoder(config, inputs.pairs, len(run["restarts"]))
    run["calibration"] = calibration.to_dict()
    with arguments.main_process_first(local=False):
        if arguments.process_index == 0:
            write_record(output / "run.json", run)
            write_atomic(output / _OPTIONS, yaml.safe_dump(run["config"], sort_keys=False, allow_unicode=True))
        checkpoint = last_checkpoint(output / "checkpoints")
    trainer, monitor = make_trainer(config, encoder, lengths, inputs, arguments, progress)
    start = time.perf_counter()
    with writing(output):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    resumed_from = 0 if checkpoint is None else step_of(checkpoint)
    return _Attempt(encoder, lengths, trainer, monitor, resumed_from, time.perf_counter() - start)


def _record_collapse(config: TrainingConfig, output: Path, run: dict[str, Any], monitor: Monitor, write: bool) -> None:
    """Prepare a restart, or raise CollapseError if there is to be none; ``write`` is true in the first process."""
    findings = [asdict(finding) for finding in monitor.findings]
    worst = next(finding for finding in monitor.findings if finding.collapse)
    evidence = f"{worst.name} at step {worst.step} ({worst.evidence})"
    if config.on_collapse == "stop" or len(run["restarts"]) == _RESTARTS:
        if write:
            write_record(output / "run.json", run | {"collapsed": findings})
        raise CollapseError(f"{output}: the training collapsed: {evidence}; {worst.fix}")
    run["restarts"].append({"k": run["calibration"]["k"], "shift": run["calibration"]["shift"], "findings": findings})
    if write:
        write_record(output / "run.json", run)
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
    logger.warning("%s; starting again from the beginning with a stronger calibration", evidence)


# ---------------------------------------------------------------------------- the result


def _measured(
    config: TrainingConfig, output: Path, run: dict[str, Any], inputs: Inputs, attempt: _Attempt, progress: bool
) -> TrainingResult:
    """Trim the level of the trained encoder, measure it, and describe the run."""
    encoder, pairs, state = attempt.encoder, inputs.pairs, attempt.trainer.state
    set_lengths(encoder, attempt.lengths)  # to measure what an index will have
    trim = trim_level(encoder, pairs, (config.query_active_dims, config.document_active_dims), progress)
    *dims, own = sample_statistics(encoder, pairs, progress)
    warn_of_missed_targets(config, (dims[0], dims[1]))
    dev = None
    if inputs.dev is not None:
        from anysplade.evaluation.evaluations import evaluate

        dev = evaluate(encoder, inputs.dev, progress=progress).to_dict()
    return TrainingResult(
        model=str(output / "model"),
        config=run["config"],
        calibration=run["calibration"],
        pairs=len(pairs),
        data_hash=pairs.data_hash,
        processes=attempt.trainer.args.world_size,
        steps=state.global_step,
        best_step=None if state.best_model_checkpoint is None else step_of(Path(state.best_model_checkpoint)),
        resumed_from=attempt.resumed_from,
        seconds=attempt.seconds,
        query_active_dims=dims[0],
        document_active_dims=dims[1],
        level_trim=trim,
        dev=dev,
        log=state.log_history,
        monitoring=attempt.monitor.to_dict(),
        restarts=run["restarts"],
        provenance=provenance(),
        ranking_loss=_ranking_loss(state.log_history),
        max_seq_length=splade_modules(encoder)[0].max_seq_length,
        query_own_words=own["query"],
        document_own_words=own["document"],
        matrix_products=matrix_products(config.precision, attempt.trainer.args.device),
    )


def _ranking_loss(log: list[dict[str, float]]) -> dict[str, dict[str, float]] | None:
    """The mean ranking loss, without the regularizers, over the first and the last tenth of the steps, at least ten.

    One batch says little. The total loss would not be comparable, because the regularizers' weights begin at 0. The log has the
    mean since the entry before.
    """
    logged: list[tuple[int, int, float]] = []  # step before the first, last step, mean over the steps in between
    for entry in log:
        if "loss" in entry:
            parts = (value for name, value in entry.items() if name.endswith("_loss") and not name.endswith("regularizer_loss"))
            logged.append((logged[-1][1] if logged else 0, int(entry["step"]), sum(parts)))
    if not logged:
        return None
    steps = logged[-1][1]
    span = max(10, steps // 10)
    first = [entry for entry in logged if entry[1] <= span] or logged[:1]
    last = [entry for entry in logged if entry[0] >= steps - span] or logged[-1:]
    means = {}
    for name, entries in (("first", first), ("last", last)):
        start, end = entries[0][0], entries[-1][1]
        mean = sum((to - after) * value for after, to, value in entries) / (end - start)
        means[name] = {"from_step": start + 1, "to_step": end, "mean": mean}
    return means


def _save(output: Path, run: dict[str, Any], encoder: SparseEncoder, result: TrainingResult) -> None:
    """Write the model with its card, and then the records."""
    shutil.rmtree(output / "model", ignore_errors=True)  # from a process that was killed in this function
    with atomic_folder(output / "model") as folder:
        encoder.save_pretrained(str(folder))
        write_card(folder, result.to_dict())
    write_record(output / "run.json", run | {"model": digests(output / "model", without=CARD_FILES)})
    write_record(output / "training.json", result.to_dict())
    shutil.rmtree(output / DATA)
