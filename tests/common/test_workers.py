import multiprocessing
import os

import pytest

from anysplade._common.workers import device_of_worker, take_device


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
def test_each_worker_has_a_gpu_of_those_that_its_parent_sees(count, visible, devices):
    assert [device_of_worker(worker, count, visible) for worker in range(3)] == devices


def test_a_worker_takes_a_device_that_no_other_has(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    devices = multiprocessing.get_context("spawn").Queue()
    seen = []
    for device in ("2", "3", None):
        devices.put(device)
        take_device(devices)
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert seen == ["2", "3", "3"]
