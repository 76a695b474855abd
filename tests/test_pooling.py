import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anysplade.pooling import splade_max_pool


def reference(hidden, weight, bias, mask, double_log):
    """sentence-transformers' SpladePooling on the logits, as it computes."""
    logits = hidden @ weight.T + (0 if bias is None else bias)
    pooled = (logits * mask.unsqueeze(-1)).relu().log1p()
    return (pooled.log1p() if double_log else pooled).amax(dim=1) if hidden.shape[1] else hidden.new_zeros(len(hidden), len(weight))


def gradients(function, hidden, weight, bias, mask, double_log, upstream):
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    out = function(leaves[0], leaves[1], leaves[2] if bias is not None else None, mask, double_log)
    out.backward(upstream.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 5),
    length=st.integers(1, 40),
    width=st.integers(1, 24),
    vocabulary=st.integers(1, 300),
    level=st.floats(-8, 4),
    padding=st.floats(0, 1),
    with_bias=st.booleans(),
    double_log=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_outputs_and_gradients_are_those_of_the_unfused(
    batch, length, width, vocabulary, level, padding, with_bias, double_log, seed
):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64) + level if with_bias else None
    mask = (torch.rand(batch, length, generator=generator) >= padding).long()
    upstream = torch.randn(batch, vocabulary, generator=generator, dtype=torch.float64)

    expected = gradients(reference, hidden, weight, bias, mask, double_log, upstream)
    exact = gradients(splade_max_pool, hidden, weight, bias, mask, double_log, upstream)
    for name, a, b in zip(("output", "hidden", "weight", "bias"), exact, expected, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")

    single = gradients(
        splade_max_pool, hidden.float(), weight.float(), None if bias is None else bias.float(), mask, double_log, upstream
    )
    torch.testing.assert_close(single[0].double(), expected[0], rtol=1e-4, atol=1e-5)


def test_without_gradients_the_output_is_the_same():
    hidden, weight = torch.randn(3, 7, 8), torch.randn(50, 8)
    mask = torch.ones(3, 7)
    kept = splade_max_pool(hidden.requires_grad_(), weight, None, mask)
    with torch.no_grad():
        assert torch.equal(splade_max_pool(hidden, weight, None, mask), kept)


def test_a_row_without_tokens_is_zero():
    out = splade_max_pool(torch.randn(2, 4, 8), torch.randn(20, 8), torch.full((20,), 5.0), torch.tensor([[0] * 4, [1] * 4]))
    assert (out[0] == 0).all()
    assert (out[1] > 0).any()


def test_a_frozen_decoder_gets_no_gradient():
    hidden, weight = torch.randn(2, 4, 8, requires_grad=True), torch.randn(20, 8)
    splade_max_pool(hidden, weight, None, torch.ones(2, 4)).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize("vocabulary", [64, 5000])
def test_bfloat16(vocabulary):
    hidden, weight = torch.randn(2, 9, 16), torch.randn(vocabulary, 16)
    mask = torch.ones(2, 9)
    half = splade_max_pool(hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_(), None, mask)
    assert half.dtype == torch.bfloat16
    half.sum().backward()
    exact = splade_max_pool(hidden, weight, None, mask)
    torch.testing.assert_close(half.float(), exact, rtol=0.05, atol=0.05)


def test_the_memory_is_not_batch_length_vocabulary():
    """Of the same step, unfused keeps at least one (batch, length, vocabulary) tensor for backward; fused none."""
    hidden, weight = torch.randn(4, 32, 8, requires_grad=True), torch.randn(3000, 8, requires_grad=True)
    mask = torch.ones(4, 32)
    sizes: dict[str, int] = {}
    for name, function in (("fused", splade_max_pool), ("unfused", reference)):
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            function(hidden, weight, None, mask, False)
        sizes[name] = max(kept)
    assert sizes["unfused"] >= 4 * 32 * 3000
    assert sizes["fused"] <= 2 * 4 * 3000
