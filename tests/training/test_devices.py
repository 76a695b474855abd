import json
import shlex
from pathlib import Path

import pytest
import torch

from anysplade import OptionError, StudyConfig, TrainingConfig, run_study, train, train_head
from anysplade.training.callbacks import MarkComplete
from anysplade.training.devices import more_gpus
from processes import run_python


@pytest.fixture
def gpus(monkeypatch):
    """A machine that seems to have several GPUs, of which the trainer uses none."""

    def set_count(count):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "GPU")

    return set_count


@pytest.mark.parametrize("count, batch_size, usable", [(16, 32, 16), (6, 32, 4), (8, 12, 6), (8, 2, 2), (3, 8, 2)])
def test_the_command_for_more_gpus(count, batch_size, usable, gpus):
    """Each process takes the same share of a batch."""
    gpus(count)
    line = more_gpus(batch_size, Path("my run/options.yaml"))
    assert line.startswith(f"one of {count} GPUs is used; to go on with {usable}, ")
    assert line.endswith(f"--nproc-per-node {usable} -m anysplade train --config 'my run/options.yaml'")


@pytest.mark.parametrize("count, batch_size, world", [(0, 32, "1"), (1, 32, "1"), (8, 32, "8"), (2, 7, "1")])
def test_no_command_if_no_more_can_be_used(count, batch_size, world, gpus, monkeypatch):
    gpus(count)
    monkeypatch.setenv("WORLD_SIZE", world)
    assert more_gpus(batch_size, Path("options.yaml")) is None


def test_the_command_continues_the_run_on_several_processes(backbone, collection_folder, tmp_path, gpus, monkeypatch, caplog):
    caplog.set_level("INFO")
    gpus(2)

    def interrupted(callback, args, state, control, **kwargs):
        saved(callback, args, state, control, **kwargs)
        raise KeyboardInterrupt

    saved = MarkComplete.on_save
    monkeypatch.setattr(MarkComplete, "on_save", interrupted)
    options = {"steps": 4, "checkpoint_steps": 2, "batch_size": 4, "max_length": 16}
    with pytest.raises(KeyboardInterrupt):
        train(TrainingConfig(backbone, str(collection_folder), output=str(tmp_path / "run"), **options))
    (line,) = (line for line in caplog.text.splitlines() if "one of 2 GPUs is used" in line)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    command = shlex.split(line.partition("start: ")[2])
    assert command[0] == "torchrun"
    done = run_python("-m", "torch.distributed.run", *command[1:])
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "run" / "training.json").read_text())
    assert (result["processes"], result["resumed_from"], result["steps"]) == (2, 2, 4)
    assert done.stdout.count("model: ") == 1  # the first process alone prints


def test_what_one_process_does_alone(teachers, collection_folder, tmp_path, gpus, monkeypatch, caplog):
    caplog.set_level("INFO")
    gpus(4)
    train_head(teachers["body"], collection_folder, tmp_path / "head", steps=1, batch_size=2, max_length=16)
    assert "one of 4 GPUs is used: a head is trained by one process" in caplog.text
    assert "torchrun" not in caplog.text
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError, match="a study is run by one process; start it without torchrun"):
        run_study(StudyConfig("main", output=str(tmp_path / "study")))
