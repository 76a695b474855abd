from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainerCallback
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from anysplade import TrainingConfig, train, train_head
from anysplade.training import steps
from anysplade.training.callbacks import common_arguments
from anysplade.training.steps import matrix_products
from tiny import make_backbone
from waits import recorded_waits

# The backward pass of pooling needs the number of its gradients that are not 0. The monitor reads an observation after the next
# step, when its copy has long arrived.
ALLOWED = {"nonzero in pooling.py: backward", "tolist in monitoring.py: read"}
CACHED = {  # sentence-transformers' gradient caching: the widths of mini-batches, and the parts of the loss
    "_local_scalar_dense in gradcache.py: _create_minibatch",
    "nonzero in gradcache.py: _create_minibatch",
    "_local_scalar_dense in cached_splade.py: calculate_loss",
    "lift_fresh in cached_splade.py: <dictcomp>",
    "lift_fresh in cached_splade.py: forward",
}
HEAD = {
    "nonzero in pooling.py: backward",
    "nonzero in head_trainer.py: loss_parts",  # the number of tokens to name
    "_local_scalar_dense in optimizer.py: step",  # AdamW counts its steps on the host, unless it is fused, as on a GPU
}


class Steps(TrainerCallback):
    """Whether one of the steps 3 to 5 is running, in which nothing is logged or stored."""

    step = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step + 1

    def __call__(self):
        return 3 <= self.step <= 5


@pytest.fixture
def waits(monkeypatch):
    """The waits in three steps of every training, as they would be on a GPU."""
    monkeypatch.setattr(steps, "_ALL_MASKS", ("cuda", "cpu"))
    monkeypatch.setattr("anysplade.model.pooling.native_int8", lambda: False)  # screening is for CPUs
    found = set()
    plain = Trainer.train

    def watched(trainer, *args, **kwargs):
        recording = Steps()
        trainer.add_callback(recording)
        with recorded_waits(recording) as waits:
            plain(trainer, *args, **kwargs)
        assert recording.step == 6
        found.update(waits)

    monkeypatch.setattr(Trainer, "train", watched)
    return found


@pytest.mark.parametrize(
    "options, allowed",
    [
        ({}, ALLOWED),
        ({"query_active_dims": 8, "document_active_dims": 20, "regularizer": "df-flops"}, ALLOWED),
        ({"mute": True, "regularizer": "l1", "gradient_accumulation": 2, "precision": "bfloat16"}, ALLOWED),
        ({"teacher": "dense"}, ALLOWED),
        ({"teacher": "sparse", "objective": "teacher"}, ALLOWED),
        ({"mini_batch_size": 4}, ALLOWED | CACHED),
    ],
)
def test_the_host_does_not_wait_in_a_training_step(options, allowed, backbone, collection_folder, teachers, tmp_path, waits):
    if "teacher" in options:
        options = options | {"teacher": teachers[options["teacher"]]}
    data, output = str(collection_folder), str(tmp_path / "run")
    train(TrainingConfig(backbone, data, output=output, steps=6, batch_size=8, max_length=16, **options))
    assert "nonzero in pooling.py: backward" in waits  # something was recorded
    assert waits <= allowed


def test_nor_with_two_kinds_of_attention(collection_folder, tmp_path, waits):
    backbone = make_backbone("modernbert", tmp_path / "backbone")
    output = str(tmp_path / "run")
    train(TrainingConfig(backbone, str(collection_folder), output=output, steps=6, batch_size=8, max_length=16))
    assert waits <= ALLOWED


def test_nor_in_a_step_of_a_head(teachers, collection_folder, tmp_path, waits):
    train_head(teachers["body"], collection_folder, tmp_path / "head", steps=6, batch_size=8, max_length=16)
    assert "nonzero in head_trainer.py: loss_parts" in waits
    assert waits <= HEAD


def test_every_mask_is_built_and_only_in_a_step(monkeypatch):
    """The mask of a batch without padding says what its absence says."""
    monkeypatch.setattr(steps, "_ALL_MASKS", ("cuda", "cpu"))
    whole, padded = torch.ones(2, 5, dtype=torch.bool), torch.tensor([[True] * 5, [True, True, False, False, False]])
    options = {"batch_size": 2, "q_length": 5, "kv_length": 5, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": True}

    def build(mask):
        every_token = lambda batch, head, query, key: query >= 0  # noqa: E731
        return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](attention_mask=mask, mask_function=every_token, **options)

    class Trainer:
        args = SimpleNamespace(device=torch.device("cpu"))

        def training_step(self, mask):
            return build(mask)

    class OwnTrainer(steps.Steps, Trainer):
        pass

    assert OwnTrainer().training_step(whole).all()
    assert torch.equal(OwnTrainer().training_step(padded), build(padded))
    assert build(whole) is None


@pytest.mark.parametrize(
    "device, capability, hip, expected",
    [
        ("cuda", (9, 0), None, "tf32"),
        ("cuda", (7, 5), None, "float32"),
        ("cuda", (9, 4), "6.2", "float32"),
        ("cpu", None, None, "float32"),
        ("mps", None, None, "float32"),
    ],
)
def test_where_float32_is_multiplied_in_tf32(device, capability, hip, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert matrix_products("float32", torch.device(device)) == expected
    assert matrix_products("bfloat16", torch.device(device)) == "bfloat16"
    seen = []

    class Trainer:
        args = SimpleNamespace(device=torch.device(device))

        def training_step(self):
            seen.append(torch.get_float32_matmul_precision())
            raise KeyboardInterrupt

    class OwnTrainer(steps.Steps, Trainer):
        pass

    with pytest.raises(KeyboardInterrupt):
        OwnTrainer().training_step()
    assert seen == ["high" if expected == "tf32" else "highest"]
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("gpu", [True, False])
def test_a_batch_is_copied_to_a_gpu_without_waiting(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    arguments = common_arguments(seed=0, checkpoint_steps=1)
    assert (arguments["dataloader_pin_memory"], arguments["accelerator_config"]["non_blocking"]) == (gpu, gpu)
