"""What the trainer calls while it trains: the dev collection, marks of whole checkpoints, a time estimate, a progress bar."""

import logging
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.evaluation import BaseEvaluator
from tqdm import tqdm
from transformers import TrainerCallback

from anysplade._common.files import write_whole
from anysplade.data.collections import Collection

logger = logging.getLogger(__name__)

DEV_METRICS = ("nDCG@10", "RR@10")
_COMPLETE = "complete"  # marks a checkpoint whose files are all there
_TIMED = 4  # steps, after the first one
_LONG = 60  # seconds: a shorter run needs no estimate


class DevEvaluator(BaseEvaluator):
    """Effectiveness and cost on the dev collection, at every checkpoint."""

    def __init__(self, collection: Collection) -> None:
        super().__init__()
        self.collection = collection

    def __call__(self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1) -> dict[str, float]:
        from anysplade.evaluation.evaluations import evaluate  # here, since it needs the extra, and training without it does not

        results = evaluate(model, self.collection, DEV_METRICS).to_dict()
        names = [*DEV_METRICS, "query_active_dims", "document_active_dims", "flops"]
        return {f"dev_{name}": results[name] for name in names}


class MarkComplete(TrainerCallback):
    """Mark a checkpoint once all its files are written, by every process; one without the mark is a torn one."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:
            torch.distributed.barrier()
        if state.is_world_process_zero:
            write_whole(Path(args.output_dir) / f"checkpoint-{state.global_step}" / _COMPLETE, "")


class Estimate(TrainerCallback):
    """Say how long the steps to come will take: after a few, and again at each tenth of the run.

    The first time it is the mean of the steps after the very first one, and counts no checkpoint and no evaluation on the dev
    collection; later batches may be longer and their vectors denser, so it can be far off. From then on it is the mean
    over all the time since the first step, with everything in it. What follows the last step never counts.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = state.global_step - self.start - 1  # without the first one, which warms up
        if done == 0:
            self.since = time.perf_counter()
        if done < _TIMED or (done > _TIMED and state.global_step % max(1, state.max_steps // 10)):
            return
        step = (time.perf_counter() - self.since) / done
        left = step * (state.max_steps - state.global_step)
        if left > _LONG:
            logger.info(
                "%.2g s a step: about %s for the %s steps to come, %s of %d process%s",
                step,
                duration(left),
                f"{state.max_steps - state.global_step:,}",
                f"{left * args.world_size / 3600:.2g} hours",
                args.world_size,
                "es" if args.world_size > 1 else "",
            )


def duration(seconds: float) -> str:
    """Hours and minutes, for a person."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


class Progress(TrainerCallback):
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


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; torn ones, left by a killed process, are removed."""
    complete = []
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / _COMPLETE).exists():
            complete.append(checkpoint)
        else:
            shutil.rmtree(checkpoint)
    return max(complete, key=step_of, default=None)
