"""Train a sparse encoder: one config, sentence-transformers' trainer.

The output folder holds ``model`` (the trained ``SparseEncoder``), ``checkpoints`` (stock ones too),
``run.json`` (what was asked for and the calibration, written before the first step) and
``training.json`` (the result, written when all is done).
"""

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SparseEncoder, SparseEncoderTrainer, SparseEncoderTrainingArguments
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback, set_seed

from anysplade.calibration import Calibration, sample_pairs
from anysplade.datasets import Pair, hash_texts, load_pairs
from anysplade.encoder import build_encoder, masked_lm
from anysplade.encoding import encode
from anysplade.errors import CollapseError, OptionError, OutputError
from anysplade.files import whole_folder, write_whole
from anysplade.head import find_head
from anysplade.monitoring import Monitor
from anysplade.options import TrainingConfig
from anysplade.provenance import provenance
from anysplade.regularization import ActiveDimsController, make_regularizer

logger = logging.getLogger(__name__)

_COMPLETE = "complete"  # marks a checkpoint whose files are all there
_RESTARTS = 3  # with on_collapse="recalibrate", each from a more strongly calibrated head
_SAMPLE = 200  # training pairs whose active dims are counted at the end


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run leaves; lies in ``training.json``."""

    model: str
    config: dict[str, Any]
    calibration: dict[str, Any]
    pairs: int
    data_hash: str
    steps: int
    resumed_from: int  # the step that this process started at: 0 unless the run was interrupted
    seconds: float  # of training in this process
    query_active_dims: float  # of the finished model, over up to 200 training pairs
    document_active_dims: float
    level_trim: float  # taken from the decoder's bias after the last step, to meet a target of active dims
    log: list[dict[str, float]]  # the trainer's own log: loss, its parts, learning rate
    monitoring: dict[str, Any]  # findings (what went wrong) and observations (what the batches' vectors were like)
    restarts: list[dict[str, Any]]  # calibration and findings of the attempts that were given up
    provenance: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def train(config: TrainingConfig, progress: bool = False) -> TrainingResult:
    """Train a SPLADE encoder with in-batch negatives and FLOPS regularisation.

    Interrupted and called again with the same config, it goes on from its last complete checkpoint;
    finished, it returns the recorded result and does nothing.

    Raises:
        OutputError: the output folder holds another run, or something else.
        ModelError, DataError, OptionError: as ``load_encoder`` and ``load_pairs`` do.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise OptionError("train runs in one process; start it without torchrun")
    output = Path(config.output).expanduser()
    asked = asdict(config)
    finished = _claim(output, asked)
    if finished is not None:
        logger.info("%s holds this run's result already", output)
        return finished
    pairs = load_pairs(config.data, progress=progress)
    if len(pairs) < 2:
        raise OptionError(f"{config.data}: one pair is too few to train on; in-batch negatives need at least 2")
    data_hash = hash_texts(text for pair in pairs for text in pair if text is not None)

    recorded = json.loads((output / "run.json").read_text()) if (output / "run.json").exists() else {}
    if recorded.get("data_hash", data_hash) != data_hash:
        raise OutputError(f"{output}: the training data changed since this run began; choose another --out")
    restarts: list[dict[str, Any]] = recorded.get("restarts", [])
    while True:
        encoder, calibration = _encoder(config, pairs, len(restarts))
        run = {"config": asked, "calibration": calibration.to_dict(), "data_hash": data_hash, "restarts": restarts}
        write_whole(output / "run.json", json.dumps(run, indent=2) + "\n")
        trainer, monitor = _trainer(config, encoder, pairs, output, progress)
        checkpoint = _last_checkpoint(output / "checkpoints")
        start = time.perf_counter()
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        seconds = time.perf_counter() - start
        if not monitor.collapsed or config.on_collapse == "warn":
            break
        _give_up_or_restart(config, output, run, monitor)

    targets = (config.query_active_dims, config.document_active_dims)
    trim = _trim_level(encoder, pairs, targets)
    dims = _active_dims(encoder, pairs)
    for role, measured, target in zip(("query", "document"), dims, targets, strict=True):
        if target is not None and not 0.9 <= measured / target <= 1.1:
            logger.warning(
                "the model ends with %.0f %s active dims, the target was %g: more steps bring it nearer, and a target far "
                "above what the model uses without a regularizer cannot be met",
                measured,
                role,
                target,
            )
    shutil.rmtree(output / "model", ignore_errors=True)  # of a run that ended between this line and the record
    with whole_folder(output / "model") as folder:
        encoder.save_pretrained(str(folder))
    result = TrainingResult(
        model=str(output / "model"),
        config=asked,
        calibration=calibration.to_dict(),
        pairs=len(pairs),
        data_hash=data_hash,
        steps=trainer.state.global_step,
        resumed_from=0 if checkpoint is None else _step(checkpoint),
        seconds=seconds,
        query_active_dims=dims[0],
        document_active_dims=dims[1],
        level_trim=trim,
        log=trainer.state.log_history,
        monitoring=monitor.to_dict(),
        restarts=restarts,
        provenance=provenance(),
    )
    write_whole(output / "training.json", json.dumps(result.to_dict(), indent=2) + "\n")
    return result


def _encoder(config: TrainingConfig, pairs: list[Pair], restarts: int) -> tuple[SparseEncoder, Calibration]:
    """The encoder to start from; after a collapse numbers for k and shift give way to "auto", and that to a stronger one."""
    set_seed(config.seed)
    queries, documents = sample_pairs(pairs, config.seed)
    k, shift = config.k, config.shift
    if restarts and not (k == "auto" and shift == "auto"):
        k, shift, restarts = "auto", "auto", restarts - 1
    return build_encoder(
        config.backbone,
        k,
        shift,
        config.fused,
        bias=config.bias,
        queries=queries,
        documents=documents,
        max_length=config.max_length,
        strength=restarts,
    )


def _give_up_or_restart(config: TrainingConfig, output: Path, run: dict[str, Any], monitor: Monitor) -> None:
    """Record a collapse; clear the way for a new start, or raise CollapseError."""
    findings = [asdict(finding) for finding in monitor.findings]
    worst = next(finding for finding in monitor.findings if finding.collapse)
    said = f"{worst.name} at step {worst.step} ({worst.evidence})"
    if config.on_collapse == "stop" or len(run["restarts"]) == _RESTARTS:
        write_whole(output / "run.json", json.dumps(run | {"collapsed": findings}, indent=2) + "\n")
        raise CollapseError(f"{output}: the training collapsed: {said}; {worst.mend}")
    run["restarts"].append({"k": run["calibration"]["k"], "shift": run["calibration"]["shift"], "findings": findings})
    write_whole(output / "run.json", json.dumps(run, indent=2) + "\n")
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    logger.warning("%s; starting again from the beginning, calibrated more strongly", said)


def _sample(pairs: list[Pair]) -> list[Pair]:
    """Evenly spaced training pairs."""
    return pairs[:: max(1, len(pairs) // _SAMPLE)][:_SAMPLE]


def _active_dims(encoder: SparseEncoder, pairs: list[Pair]) -> tuple[float, float]:
    """Mean active dims of queries and of documents, over a sample of the training pairs."""
    sample = _sample(pairs)
    queries = encode(encoder, [pair.query for pair in sample], "query")
    documents = encode(encoder, [pair.positive for pair in sample], "document")
    return queries.nnz / len(sample), documents.nnz / len(sample)


def _trim_level(encoder: SparseEncoder, pairs: list[Pair], targets: tuple[float | None, float | None]) -> float:
    """Shift the decoder's bias by at most 1 so that a sample of the training texts meets the targets of active dims.

    The regularizer's weight loses its force as the learning rate falls to 0; one constant corrects what is
    left. Of two targets it makes the larger error, on a logarithmic scale, as small as it can be.
    """
    biases = find_head(masked_lm(encoder)).biases
    if targets == (None, None) or not biases:
        return 0.0
    sample = _sample(pairs)
    _lower(biases, -1.0)  # so that what lies up to 1 below zero is seen too
    shifts = np.linspace(-1, 1, 401)
    errors = []
    roles: tuple[Literal["query", "document"], ...] = ("query", "document")
    for role, target in zip(roles, targets, strict=True):
        if target is not None:
            texts = [pair.query if role == "query" else pair.positive for pair in sample]
            logits = np.sort(np.expm1(encode(encoder, texts, role).data)) - 1
            active = (len(logits) - np.searchsorted(logits, shifts, side="right")) / len(sample)
            errors.append(np.abs(np.log(np.maximum(active, 1e-3) / target)))
    shift = float(shifts[np.max(errors, axis=0).argmin()])
    _lower(biases, 1.0 + shift)
    return shift


@torch.no_grad()
def _lower(biases: Iterable[torch.Tensor], by: float) -> None:
    for bias in biases:
        bias -= by


def _claim(output: Path, asked: dict[str, Any]) -> TrainingResult | None:
    """Check that the output folder is new or holds this very run; the result if it is finished."""
    if not (output / "run.json").exists():
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise OutputError(f"{output}: holds something that is no run of anysplade; choose another --out")
        return None
    run = json.loads((output / "run.json").read_text())
    recorded = run["config"]
    different = [f"{name} {recorded.get(name)!r}, now {asked[name]!r}" for name in asked if recorded.get(name) != asked[name]]
    if different:
        raise OutputError(f"{output}: holds a run with other options ({'; '.join(different)}); choose another --out or remove it")
    if "collapsed" in run:
        raise CollapseError(f"{output}: this run collapsed before; change the options and choose another --out")
    if (output / "training.json").exists() and (output / "model").is_dir():
        known = {field.name for field in fields(TrainingResult)}
        return TrainingResult(**{k: v for k, v in json.loads((output / "training.json").read_text()).items() if k in known})
    return None


def _trainer(
    config: TrainingConfig, encoder: SparseEncoder, pairs: list[Pair], output: Path, progress: bool
) -> tuple[SparseEncoderTrainer, Monitor]:
    # The trainer reads columns by their order: query, positive, negative.
    columns = {name: [getattr(pair, name) for pair in pairs] for name in Pair._fields if getattr(pairs[0], name) is not None}
    ranking = SparseMultipleNegativesRankingLoss(encoder)
    loss = SpladeLoss(
        encoder,
        ranking,
        document_regularizer_weight=config.document_regularizer_weight,
        query_regularizer_weight=config.query_regularizer_weight,
        document_regularizer=make_regularizer(config.regularizer, encoder),
        query_regularizer=make_regularizer(config.regularizer, encoder),
    )
    vocabulary = encoder.get_embedding_dimension() or 0
    monitor = Monitor(ranking, vocabulary, stop=config.on_collapse != "warn")
    arguments = SparseEncoderTrainingArguments(
        output_dir=str(output / "checkpoints"),
        max_steps=config.steps or -1,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_ratio,
        seed=config.seed,
        data_seed=config.seed,
        batch_sampler=BatchSamplers.NO_DUPLICATES,  # a text twice in a batch would be its own negative
        save_strategy="steps",
        save_steps=config.checkpoint_steps,
        save_total_limit=2,
        logging_steps=10,
        logging_first_step=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = SparseEncoderTrainer(
        model=encoder,
        args=arguments,
        train_dataset=Dataset.from_dict(columns),
        loss=loss,
        callbacks=[
            # Stands for the ramp that the trainer would add by itself.
            ActiveDimsController(loss, config.query_active_dims, config.document_active_dims),
            _MarkComplete(),
            _Progress(progress),
        ],
    )
    trainer.callback_handler.callbacks.insert(1, monitor)  # before the trackers, which then get what it logs
    trainer.remove_callback(PrinterCallback)  # writes to standard output, which belongs to the result
    return trainer, monitor


class _MarkComplete(TrainerCallback):
    """Mark a checkpoint once all its files are written; one without the mark is a torn one."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        write_whole(Path(args.output_dir) / f"checkpoint-{state.global_step}" / _COMPLETE, "")


class _Progress(TrainerCallback):
    """One bar with the loss, on standard error."""

    def __init__(self, shown: bool) -> None:
        self.bar = tqdm(desc="training", unit="step", disable=not shown, leave=False, file=sys.stderr)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.reset(total=state.max_steps)
        self.bar.update(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3g}", refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; torn ones, left by a killed process, are removed."""
    complete = []
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / _COMPLETE).exists():
            complete.append(checkpoint)
        else:
            shutil.rmtree(checkpoint)
    return max(complete, key=_step, default=None)
