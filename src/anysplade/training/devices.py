"""The processes of a training and their GPUs, one for each."""

import logging
import os
import shlex
from pathlib import Path

import torch
from transformers import TrainingArguments

from anysplade.errors import OptionError

logger = logging.getLogger(__name__)


def processes() -> int:
    """Number of processes that work together, which ``torchrun`` started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def require_one_process(what: str) -> None:
    """Raise OptionError if ``torchrun`` started several processes for what one does alone, such as "a head is trained"."""
    if processes() > 1:
        raise OptionError(f"{what} by one process; start it without torchrun")


def use_one_gpu(arguments: TrainingArguments) -> torch.device:
    """Connect the processes and give each of them one GPU.

    With several in a process, transformers would wrap the model in ``DataParallel``: each GPU would take a batch of its own, and
    the model's copies would pool with the first one's weights.
    """
    device = arguments.device  # connects the processes and counts the GPUs
    arguments._n_gpu = min(1, arguments.n_gpu)
    return device


def say_one_gpu(what: str) -> None:
    """Say that GPUs stay idle in what one process does alone."""
    if (gpus := torch.cuda.device_count()) > 1:
        logger.info("one of %d GPUs is used: %s by one process", gpus, what)


def more_gpus(batch_size: int, options: Path) -> str | None:
    """A sentence with the command that continues a run on more GPUs, None if it has all that it can use.

    The processes share a batch, so their number divides ``batch_size``. ``options`` is the file with the run's options.
    """
    gpus = torch.cuda.device_count()
    usable = max((count for count in range(1, gpus + 1) if batch_size % count == 0), default=1)
    if processes() > 1 or usable == 1:
        return None
    command = f"torchrun --standalone --nproc-per-node {usable} -m anysplade train --config {shlex.quote(str(options))}"
    return f"one of {gpus} GPUs is used; to go on with {usable}, end this run and start: {command}"
