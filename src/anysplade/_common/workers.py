"""The distribution of a machine's GPUs among worker processes."""

import os
from multiprocessing.context import SpawnContext
from typing import Any


def count_gpus() -> int:
    """Number of workers that use every GPU that this process sees; 1 without one."""
    import torch

    return max(1, torch.cuda.device_count())


def device_of_worker(worker: int, count: int, visible: str | None) -> str | None:
    """``CUDA_VISIBLE_DEVICES`` for a worker: one of the parent's GPUs, in turn; None if there is no GPU.

    Args:
        worker: number of the worker, from 0.
        count: number of GPUs that the parent sees.
        visible: the parent's ``CUDA_VISIBLE_DEVICES``: numbers or UUIDs, separated by commas.
    """
    names = visible.split(",")[:count] if visible else [str(number) for number in range(count)]
    return names[worker % len(names)].strip() if names else None


def devices_of_workers(context: SpawnContext, workers: int) -> Any:
    """A queue from which each worker gets its device with ``take_device``."""
    import torch

    devices = context.Queue()
    for worker in range(workers):
        devices.put(device_of_worker(worker, torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")))
    return devices


def take_device(devices: Any) -> None:
    """Take a device from the queue and hide all others; a worker calls this before it uses a GPU."""
    device = devices.get()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
