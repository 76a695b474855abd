"""Worker processes that share a machine's GPUs."""

import os
from multiprocessing.context import SpawnContext
from typing import Any


def device_of_worker(worker: int, count: int, visible: str | None) -> str | None:
    """``CUDA_VISIBLE_DEVICES`` for a worker: one GPU of its parent's, in turn; None if there is no GPU.

    Args:
        worker: its number, from 0.
        count: number of GPUs that the parent sees.
        visible: the parent's ``CUDA_VISIBLE_DEVICES``: numbers or UUIDs, separated by commas.
    """
    names = visible.split(",")[:count] if visible else [str(number) for number in range(count)]
    return names[worker % len(names)].strip() if names else None


def devices_of_workers(context: SpawnContext, workers: int) -> Any:
    """A queue from which each of the workers takes its device, with ``take_device``."""
    import torch

    devices = context.Queue()
    for worker in range(workers):
        devices.put(device_of_worker(worker, torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")))
    return devices


def take_device(devices: Any) -> None:
    """In a worker, before anything uses a GPU: take a device from the queue and hide all others."""
    device = devices.get()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
