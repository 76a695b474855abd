"""What all trainers here share: arguments, callbacks, and checkpoints that survive a crash."""

import json
import logging
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.evaluation import BaseEvaluator
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from anysplade._common.files import write_atomic
from anysplade._common.outputs import damaged_file, digests, read_record
from anysplade._common.progress import bar, counted, duration
from anysplade.data.collections import Collection
from anysplade.errors import OptionError
from anysplade.model.saved import first_line

logger = logging.getLogger(__name__)

DEV_METRICS = ("nDCG@10", "RR@10")
_COMPLETE = "complete"  # a checkpoint's last file: the digests of its other files
_NAME = re.compile(r"checkpoint-\d+")
_TIMED = 4  # steps, after the first one, before the first estimate
_LONG = 60  # seconds: a shorter rest of a run needs no estimate
_OWN_CHECK = ("azure_ml", "flyte", "kubeflow")  # trackers that check only by themselves whether they are installed


def common_arguments(seed: int, checkpoint_steps: int) -> dict[str, Any]:
    """Arguments of the trainer that do not depend on what is trained."""
    gpu = torch.cuda.is_available()
    saving = {"save_strategy": "steps", "save_steps": checkpoint_steps, "save_total_limit": 2}
    logs = {"logging_steps": 10, "logging_first_step": True, "disable_tqdm": True}
    device: dict[str, Any] = {"dataloader_pin_memory": gpu, "use_cpu": not gpu and not torch.backends.mps.is_available()}
    device["accelerator_config"] = {"non_blocking": gpu}  # copying a batch to a GPU does not wait for the step before it
    return {"seed": seed, "data_seed": seed} | saving | logs | device


class DevEvaluator(BaseEvaluator):
    """Effectiveness and cost on the dev collection, measured at every checkpoint."""

    def __init__(self, collection: Collection) -> None:
        super().__init__()
        self.collection = collection

    def __call__(self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1) -> dict[str, float]:
        from anysplade.evaluation.evaluations import evaluate  # needs an extra, which other trainings do without

        results = evaluate(model, self.collection, DEV_METRICS).to_dict()
        names = [*DEV_METRICS, "query_active_dims", "document_active_dims", "flops"]
        return {f"dev_{name}": results[name] for name in names}


class Patience(EarlyStoppingCallback):
    """Early stopping that remembers after an interruption how many checkpoints were no better."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and saved:
            self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
            control.should_training_stop |= self.early_stopping_patience_counter >= self.early_stopping_patience


class EndsOnce:
    """Mixin for a trainer: resumed from the checkpoint of the last step, it does not make one more step."""

    state: Any
    control: Any

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self.control.should_training_stop |= self.state.global_step >= self.state.max_steps
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]  # the trainer has it


class Estimate(TrainerCallback):
    """Log how long the remaining steps will take: after a few steps, and again at each tenth of the run.

    The first estimate is the mean time of the steps after the very first one. It includes no checkpoint and no evaluation on the
    dev collection, and later batches may be longer and their vectors denser, so it can be far off. Later estimates are the
    mean over all the time since the first step, with everything in it. What follows the last step is never included.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = state.global_step - self.start - 1  # without the first one, which warms up
        if done == 0:
            self.since = time.perf_counter()
        if done < _TIMED or (done > _TIMED and state.global_step % max(1, state.max_steps // 10)):
            return
        step, remaining = (time.perf_counter() - self.since) / done, state.max_steps - state.global_step
        if step * remaining > _LONG:
            logger.info(
                "%.2g s per step: about %s for the remaining %s%s",
                step,
                duration(step * remaining),
                counted(remaining, "step"),
                f", on {counted(args.world_size, 'process')}" if args.world_size > 1 else "",
            )


class Progress(TrainerCallback):
    """A progress bar with the loss, or lines in the log."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = bar("training", "step", state.max_steps, show=True, done=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3g}", refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def check_trackers(names: Sequence[str]) -> None:
    """Raise OptionError, before the training, if a tracker is unknown or not installed."""
    usable = {*get_available_reporting_integrations(), *_OWN_CHECK}
    for name in names if tuple(names) not in (("all",), ("none",)) else ():
        if name not in INTEGRATION_TO_CALLBACK:
            raise OptionError(
                f"`report_to={name}`: no such tracker; the trainer knows {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
            )
        if name not in usable:
            raise OptionError(f"`report_to={name}`: it is not installed; pip install {name.replace('_', '-')}, or leave it out")
        if name in _OWN_CHECK:
            try:
                INTEGRATION_TO_CALLBACK[name]()
            except (ImportError, RuntimeError) as error:
                raise OptionError(f"`report_to={name}`: {first_line(error)}") from error


# ---------------------------------------------------------------------------- checkpoints


class MarkComplete(TrainerCallback):
    """Mark a checkpoint as complete after every process has written its files."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:
            torch.distributed.barrier()
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_atomic(checkpoint / _COMPLETE, json.dumps(digests(checkpoint)) + "\n")


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def last_checkpoint(folder: Path) -> Path | None:
    """The newest undamaged checkpoint, or None; with a dev collection, the best checkpoint so far must be undamaged too.

    Incomplete and damaged checkpoints are removed, with one warning for all.
    """
    whole: list[Path] = []
    faults = []
    for checkpoint in sorted((path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)), key=step_of):
        fault = _damage(checkpoint)
        best = None if fault else (read_record(checkpoint / "trainer_state.json") or {}).get("best_model_checkpoint")
        if best is not None and Path(best).name not in [checkpoint.name, *(one.name for one in whole)]:
            fault = f"its best one, {Path(best).name}, is gone"
        if fault is None:
            whole.append(checkpoint)
        else:
            faults.append(f"{checkpoint.name}: {fault}")
            shutil.rmtree(checkpoint)
    if faults:
        logger.warning("%s: %s; going on from %s", folder, ", ".join(faults), whole[-1].name if whole else "the start")
    return whole[-1] if whole else None


def _damage(checkpoint: Path) -> str | None:
    if not (checkpoint / _COMPLETE).is_file():
        return "it is incomplete"
    known = read_record(checkpoint / _COMPLETE)
    name = damaged_file(checkpoint, known) if known else _COMPLETE
    return name and f"{name} is missing or damaged"
