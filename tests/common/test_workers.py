import multiprocessing
import os
import queue
from types import SimpleNamespace

import pytest

from anysplade._common.workers import devices_of_workers, take_device


@pytest.mark.parametrize(
    "count, visible, devices",
    [
        (0, None, [None, None, None]),
        (0, "", [None, None, None]),
        (2, None, ["0", "1", "0"]),
        (2, "2,3", ["2", "3", "2"]),
        (4, "7, 5,6,4", ["7", "5", "6"]),
        (1, "GPU-5a,GPU-6b", ["GPU-5a", "GPU-5a", "GPU-5a"]),  # the second is none of this machine's
    ],
)
def test_each_worker_has_a_gpu_of_those_that_its_parent_sees(count, visible, devices, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert list(devices_of_workers(SimpleNamespace(Queue=queue.Queue), 3).queue) == devices


def test_a_worker_takes_a_device_that_no_other_has(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    devices = multiprocessing.get_context("spawn").Queue()
    seen = []
    for device in ("2", "3", None):
        devices.put(device)
        take_device(devices)
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert seen == ["2", "3", "3"]
