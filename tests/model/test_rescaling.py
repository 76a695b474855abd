import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForMaskedLM,
    MobileBertConfig,
    MobileBertForMaskedLM,
)

from anysplade import ModelError, OptionError, rescale_head
from anysplade.model.head import find_head
from architectures import ARCHITECTURES, VOCABULARY, run, small_model
from tiny import make_backbone


@pytest.mark.parametrize("k, shift", [(2.5, 1.25), (1.0, 3.0)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rescaling_is_exact_and_survives_the_disk(architecture, k, shift, ids, tmp_path):
    model = small_model(architecture)
    head = find_head(model)
    if not head.biases:
        k, shift = 2.5, 0.0
    tied = head.decoder.weight is model.get_input_embeddings().weight
    before, hidden = run(model, ids)

    assert rescale_head(model, k=k, shift=shift) is model
    after, hidden_after = run(model, ids)
    scale = before.abs().max().item()
    torch.testing.assert_close(after, before / k - shift, rtol=0, atol=2e-6 * max(1, scale))
    assert all(torch.equal(a, b) for a, b in zip(hidden, hidden_after, strict=True))
    assert (find_head(model).decoder.weight is model.get_input_embeddings().weight) == (tied and k == 1)

    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    loaded.tie_weights()
    assert torch.equal(run(loaded, ids)[0], after)
    record = loaded.config.anysplade
    assert (record["k"], record["shift"]) == (k, shift)
    for bias in find_head(loaded).biases:
        assert bias.abs().max() > 0


@settings(max_examples=30, deadline=None)
@given(k=st.floats(0.01, 100), shift=st.floats(-50, 50), policy=st.sampled_from(["scale", "keep"]))
def test_any_k_and_shift(k, shift, policy):
    model = small_model("bert")
    ids = torch.arange(5, 21).reshape(2, 8)
    before, bias = run(model, ids)[0], find_head(model).bias.clone()
    rescale_head(model, k, shift, policy)
    expected = before / k - shift + (bias * (1 - 1 / k) if policy == "keep" else 0)
    torch.testing.assert_close(run(model, ids)[0], expected, rtol=1e-4, atol=1e-4 * max(1, 1 / k))


def test_k_1_keeps_tie_and_size():
    model = small_model("bert")
    size = sum(p.numel() for p in model.parameters())
    rescale_head(model, k=1, shift=2)
    assert model.config.tie_word_embeddings
    assert sum(p.numel() for p in model.parameters()) == size
    rescale_head(model, k=2, shift=0)
    assert not model.config.tie_word_embeddings
    model.tie_weights()
    assert find_head(model).decoder.weight is not model.get_input_embeddings().weight


def test_k_1_shift_0_changes_nothing():
    model = small_model("bert")
    rescale_head(model, k=1, shift=0)
    assert not hasattr(model.config, "anysplade")


def test_twice_says_so_and_composes(ids, caplog):
    model = small_model("roberta")
    before = run(model, ids)[0]
    rescale_head(model, k=4, shift=1)
    with caplog.at_level(logging.WARNING):
        rescale_head(model, k=2, shift=-3)
    assert "was rescaled before (k=4, shift=1)" in caplog.text
    torch.testing.assert_close(run(model, ids)[0], (before / 4 - 1) / 2 + 3, rtol=0, atol=1e-4)
    assert model.config.anysplade["earlier"]["k"] == 4


@pytest.mark.parametrize("k", [0, -1, float("nan"), float("inf")])
def test_impossible_k(k):
    with pytest.raises(OptionError, match="k is"):
        rescale_head(small_model("bert"), k=k)


def test_impossible_shift_and_policy():
    with pytest.raises(OptionError, match="shift is nan"):
        rescale_head(small_model("bert"), shift=float("nan"))
    with pytest.raises(OptionError, match="'scale'"):
        rescale_head(small_model("bert"), bias="other")


def test_a_head_without_bias_cannot_shift(ids):
    model = small_model("modernbert", decoder_bias=False)
    before = run(model, ids)[0]
    with pytest.raises(ModelError, match="no bias, so it cannot be shifted"):
        rescale_head(model, k=2, shift=1)
    assert torch.equal(run(model, ids)[0], before)
    torch.testing.assert_close(run(rescale_head(model, k=2), ids)[0], before / 2)


def test_a_head_of_two_projections_is_refused_and_left_as_it_was(ids):
    config = MobileBertConfig(vocab_size=VOCABULARY, hidden_size=32, embedding_size=16, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    model = MobileBertForMaskedLM(config).eval()
    before = run(model, ids)[0]
    with pytest.raises(ModelError, match="not one projection"):
        rescale_head(model, k=2)
    assert torch.equal(run(model, ids)[0], before)
    assert model.config.tie_word_embeddings
    assert find_head(model).decoder.weight is model.get_input_embeddings().weight


def test_rescaling_half_precision(tmp_path):
    folder = make_backbone("bert", tmp_path / "bf16", dtype="bfloat16")
    model = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.bfloat16)
    rescale_head(model, k=8, shift=1)
    assert find_head(model).decoder.weight.dtype == torch.bfloat16
