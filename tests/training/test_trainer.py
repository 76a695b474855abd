import functools
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from anysplade import TrainingConfig
from anysplade.training.head_trainer import head_arguments
from anysplade.training.trainer import training_arguments


@pytest.fixture
def config(backbone, collection_folder, tmp_path):
    def make(**options):
        return TrainingConfig(backbone, str(collection_folder), output=str(tmp_path / "run"), batch_size=4, **options)

    return make


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_that_the_processor_would_emulate_is_said(config, native, monkeypatch, caplog):
    monkeypatch.setattr("anysplade.training.trainer.native_bfloat16", lambda device: native)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = config(precision="bfloat16")
    training_arguments(options, Path(options.output))
    assert any("`precision=float32` is faster here" in message for message in caplog.messages) is not native


@pytest.mark.parametrize("several", [1, 4])
@pytest.mark.parametrize("trained", ["encoder", "head"])
def test_one_process_uses_one_gpu(trained, several, config, tmp_path, monkeypatch):
    """transformers would wrap the model in DataParallel, whose copies pool with the first GPU's weights."""

    def devices(arguments):  # what transformers finds on a machine with several GPUs
        arguments._n_gpu, arguments.distributed_state = several, None
        return torch.device("cuda:0")

    found = functools.cached_property(devices)
    found.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", found)
    if trained == "encoder":
        arguments = training_arguments(config(), tmp_path)
    else:
        options = {"steps": 1, "batch_size": 4, "learning_rate": 1e-3, "seed": 0}
        arguments = head_arguments(tmp_path, options, 1)
    assert arguments.parallel_mode == ParallelMode.NOT_PARALLEL
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 4)
