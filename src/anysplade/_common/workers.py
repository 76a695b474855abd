"""The distribution of a machine's GPUs among worker processes."""

import os
from multiprocessing.context import SpawnContext
from typing import Any


def devices_of_workers(context: SpawnContext, workers: int) -> Any:
    """A queue from which each worker gets its device with ``take_device``: one of this process's GPUs, in turn, or None."""
    import torch

    visible, count = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    names = visible.split(",")[:count] if visible else [str(number) for number in range(count)]  # numbers or UUIDs
    devices = context.Queue()
    for worker in range(workers):
        devices.put(names[worker % count].strip() if names else None)
    return devices


def take_device(devices: Any) -> None:
    """Take a device from the queue and hide all others; a worker calls this before it uses a GPU."""
    device = devices.get()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
