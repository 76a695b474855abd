"""Checkpoints and finished runs that an accident damaged: what is whole is gone on from, and ends as if nothing had happened."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from anysplade import OptionError, OutputError, TrainingConfig, train
from anysplade._common.files import only_process
from anysplade._common.outputs import digests
from anysplade.training.callbacks import last_checkpoint
from processes import room_for


def remove(file):
    file.unlink()


def empty(file):
    replace(file, b"")


def cut(file):
    replace(file, file.read_bytes()[: file.stat().st_size // 2])


def spoil(file):
    """Other bytes of the same number in its middle."""
    content = file.read_bytes()
    middle = len(content) // 2
    replace(file, content[:middle] + bytes(255 - byte for byte in content[middle : middle + 16]) + content[middle + 16 :])


def replace(file, content):
    file.unlink()  # another file: what was read from the old one may be mapped into memory
    file.write_bytes(content)


DAMAGES = (remove, empty, cut, spoil)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, backbone, collection_folder):
    """A finished run with the checkpoints of its steps 4 and 8, and a copy of it that stays whole."""
    folder = tmp_path_factory.mktemp("damaged")
    options = {"steps": 8, "batch_size": 4, "checkpoint_steps": 4, "learning_rate": 1e-3, "max_length": 16}
    config = TrainingConfig(backbone, str(collection_folder), output=str(folder / "run"), **options)
    train(config)
    shutil.copytree(folder / "run", folder / "copy")
    return config


@pytest.fixture
def config(whole):
    run = Path(whole.output)
    shutil.rmtree(run)
    shutil.copytree(run.with_name("copy"), run)
    return whole


def interrupt(config):
    """The run as a process leaves it that is killed after the last step."""
    run = Path(config.output)
    shutil.rmtree(run / "model")
    (run / "training.json").unlink()
    return run


def assert_as_uninterrupted(config):
    run, copy = Path(config.output), Path(config.output).with_name("copy")
    found, expected = (load_file(folder / "model" / "model.safetensors") for folder in (run, copy))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    found, expected = (json.loads((folder / "training.json").read_text()) for folder in (run, copy))
    assert (found["steps"], found["monitoring"]) == (expected["steps"], expected["monitoring"])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, config, caplog):
    checkpoints = Path(config.output) / "checkpoints"
    files = [path.relative_to(checkpoints / "checkpoint-8") for path in (checkpoints / "checkpoint-8").rglob("*") if path.is_file()]
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "complete"} < {
        str(name) for name in files
    }
    for name in files:
        shutil.copytree(checkpoints.parent.with_name("copy") / "checkpoints", checkpoints, dirs_exist_ok=True)
        assert last_checkpoint(checkpoints).name == "checkpoint-8"
        damage(checkpoints / "checkpoint-8" / name)
        caplog.clear()
        assert last_checkpoint(checkpoints).name == "checkpoint-4"
        assert "going on from checkpoint-4" in caplog.text
        assert str(name) in caplog.text or "it is incomplete" in caplog.text
        assert not (checkpoints / "checkpoint-8").exists()


def test_a_copy_of_a_checkpoint_is_left_alone(config):
    checkpoints = Path(config.output) / "checkpoints"
    shutil.copytree(checkpoints / "checkpoint-8", checkpoints / "checkpoint-8-mine")
    assert last_checkpoint(checkpoints).name == "checkpoint-8"
    assert (checkpoints / "checkpoint-8-mine").exists()


def test_without_the_best_checkpoint_the_others_are_useless(config, caplog):
    checkpoints = Path(config.output) / "checkpoints"
    state = checkpoints / "checkpoint-8" / "trainer_state.json"
    replace(state, json.dumps(json.loads(state.read_text()) | {"best_model_checkpoint": "run/checkpoints/checkpoint-4"}).encode())
    replace(checkpoints / "checkpoint-8" / "complete", json.dumps(digests(state.parent, without=["complete"])).encode())
    assert last_checkpoint(checkpoints).name == "checkpoint-8"
    cut(checkpoints / "checkpoint-4" / "model.safetensors")
    assert last_checkpoint(checkpoints) is None
    assert "its best one, checkpoint-4, is gone" in caplog.text
    assert "going on from the start" in caplog.text


@pytest.mark.parametrize(
    "damaged, from_step",
    [
        ((), 8),
        (("checkpoints/checkpoint-8/scheduler.pt",), 4),
        (("checkpoints/checkpoint-8/optimizer.pt", "checkpoints/checkpoint-4/rng_state.pth"), 0),
        (("run.json",), 0),
    ],
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(damaged, from_step, config):
    run = interrupt(config)
    for name in damaged:
        (remove if name.endswith("scheduler.pt") else cut)(run / name)
    assert train(config).resumed_from == from_step
    assert_as_uninterrupted(config)


@pytest.mark.parametrize(
    "damage, name, done_again",
    [
        (shutil.rmtree, "model", True),
        (cut, "model/model.safetensors", True),
        (spoil, "model/model.safetensors", True),
        (remove, "model/tokenizer.json", True),
        (empty, "training.json", True),
        (cut, "run.json", True),  # it had the digests by which a model is known to be whole
        (remove, "model/README.md", False),  # for people
    ],
)
def test_a_damaged_finished_run_is_finished_again(damage, name, done_again, config, caplog):
    damage(Path(config.output) / name)
    train(config)
    assert ("it is made again" in caplog.text or "training.json: is damaged" in caplog.text) is done_again
    assert_as_uninterrupted(config)
    caplog.clear()
    with caplog.at_level("INFO", "anysplade"):
        train(config)
    assert "already has this run's result" in caplog.text


@pytest.mark.parametrize("name", ["flyte", "kubeflow", "azure_ml"])
def test_a_tracker_that_says_itself_what_it_lacks(name, config, tmp_path):
    other = dataclasses.replace(config, report_to=(name,), output=str(tmp_path / "other"))
    with pytest.raises(OptionError, match=f"`report_to={name}`: .*requires") as caught:
        train(other)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "other").exists()


def test_patience_outlives_an_interruption(config, collection_folder, tmp_path):
    """A learning rate that ruins the model: training ends early, whenever it is interrupted."""
    options = {"dev": str(collection_folder), "dev_split": "test", "patience": 2, "checkpoint_steps": 3, "steps": 60}
    config = dataclasses.replace(config, learning_rate=0.05, output=str(tmp_path / "run"), **options)
    steps = train(config).steps
    expected = load_file(tmp_path / "run" / "model" / "model.safetensors")
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    for checkpoint in (steps, steps - 3):
        interrupt(config)
        for later in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"):
            if int(later.name.rpartition("-")[2]) > checkpoint:
                shutil.rmtree(later)
        assert train(config).steps == steps
        found = load_file(tmp_path / "run" / "model" / "model.safetensors")
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_second_run_in_one_folder_is_refused_at_once(config):
    run = interrupt(config)
    with only_process(run), pytest.raises(OutputError, match="another process works there now; wait for it"):
        train(config)
    assert not (run / "lock").exists()


def test_a_run_goes_on_when_there_is_room_again(config):
    run = Path(config.output)
    sizes = [(run / "checkpoints" / "checkpoint-8" / name).stat().st_size for name in ("model.safetensors", "optimizer.pt")]
    shutil.rmtree(run)
    for size in sizes:
        with pytest.raises(OutputError, match=r"run: cannot be written: .*; make room"), room_for(size - 1):
            train(config)
    train(config)
    assert_as_uninterrupted(config)
