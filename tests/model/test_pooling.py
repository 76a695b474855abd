import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

import anysplade.model.pooling as pooling_module
import anysplade.model.tiles as tiles_module
from anysplade.model.pooling import max_logits, splade_pool
from anysplade.model.screening import screened_max
from anysplade.model.tiles import tiles
from architectures import stock_pooling as reference


def gradients(function, hidden, weight, bias, mask, pooling, double_log, upstream):
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    out = function(leaves[0], leaves[1], leaves[2] if bias is not None else None, mask, pooling, double_log)
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
    pooling=st.sampled_from(["max", "sum"]),
    double_log=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_outputs_and_gradients_are_those_of_the_unfused(
    batch, length, width, vocabulary, level, padding, with_bias, pooling, double_log, seed
):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64) + level if with_bias else None
    mask = (torch.rand(batch, length, generator=generator) >= padding).long()
    upstream = torch.randn(batch, vocabulary, generator=generator, dtype=torch.float64)

    expected = gradients(reference, hidden, weight, bias, mask, pooling, double_log, upstream)
    exact = gradients(splade_pool, hidden, weight, bias, mask, pooling, double_log, upstream)
    for name, a, b in zip(("output", "hidden", "weight", "bias"), exact, expected, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")

    single = gradients(
        splade_pool,
        hidden.float(),
        weight.float(),
        None if bias is None else bias.float(),
        mask,
        pooling,
        double_log,
        upstream.float(),
    )
    torch.testing.assert_close(single[0].double(), expected[0], rtol=1e-5, atol=1e-5)
    if pooling == "max" and near_ties(hidden, weight, mask):
        return  # float32 may choose another token than float64 does, and both are right
    for name, a, b in zip(("hidden", "weight", "bias"), single[1:], expected[1:], strict=False):
        error = (a.double() - b).norm() / b.norm().clamp(min=1e-3)
        assert error <= 1e-4, (name, error)


def near_ties(hidden, weight, mask):
    """Whether two tokens come within float32's rounding of each other at some (sequence, term), or a logit of 0."""
    logits = (hidden @ weight.T).masked_fill(~mask.bool().unsqueeze(-1), -torch.inf)
    if hidden.shape[1] == 1:
        return False
    first, second = logits.topk(2, dim=1).values.unbind(dim=1)
    return bool(((first - second) < 1e-4).any())


def test_a_gpu_gets_few_large_products():
    """8 MiB of logits at a time suit a CPU's cache; on a GPU each tile is a launch."""
    texts, length, vocabulary = 32, 256, 50_368

    def launches(device):
        return len(list(tiles(vocabulary, 2 * texts * length, torch.device(device))))

    assert launches("cuda") <= 4 < 90 < launches("cpu")


def test_every_tile_is_one_product(monkeypatch):
    """As many products as tiles, counted by the profiler."""
    hidden, weight, mask = torch.randn(4, 16, 8), torch.randn(4096, 8), torch.ones(4, 16)
    for size in (2**16, 2**20):
        monkeypatch.setitem(tiles_module._TILE_BYTES, "cpu", size)
        monkeypatch.setattr(pooling_module, "native_int8", lambda: False)
        with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
            splade_pool(hidden, weight, None, mask)
        products = sum(event.count for event in trace.key_averages() if event.key == "aten::mm")
        assert products == max(1, 4 * 4096 * 4 * 16 // size)


@pytest.mark.parametrize("level", [0.0, -9.0])
def test_without_gradients_the_output_is_the_same(level, monkeypatch):
    hidden, weight, bias = torch.randn(3, 7, 8), torch.randn(500, 8), torch.full((500,), level)
    mask = torch.ones(3, 7)
    kept = splade_pool(hidden.requires_grad_(), weight, bias, mask)
    for native in (True, False):
        monkeypatch.setattr(pooling_module, "native_int8", lambda native=native: native)
        with torch.no_grad():
            torch.testing.assert_close(splade_pool(hidden, weight, bias, mask), kept)


def test_a_row_without_tokens_is_zero():
    out = splade_pool(torch.randn(2, 4, 8), torch.randn(20, 8), torch.full((20,), 5.0), torch.tensor([[0] * 4, [1] * 4]))
    assert (out[0] == 0).all()
    assert (out[1] > 0).any()


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 5),
    length=st.integers(1, 20),
    vocabulary=st.integers(1, 300),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_largest_logits_and_their_gradients(batch, length, vocabulary, with_bias, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((batch, length, 8), (vocabulary, 8), (vocabulary,))
    )
    mask = torch.rand(batch, length, generator=generator) < 0.6
    mask[:, 0] = True
    leaves = (hidden, weight, bias) if with_bias else (hidden, weight)
    plain = linear(hidden, weight, bias if with_bias else None).masked_fill(~mask.unsqueeze(2), -torch.inf).amax(dim=1)
    fused = max_logits(hidden, weight, bias if with_bias else None, mask)
    torch.testing.assert_close(fused, plain)
    upstream = torch.randn(batch, vocabulary, generator=generator, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad(out, leaves, upstream) for out in (fused, plain)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_frozen_decoder_gets_no_gradient():
    hidden, weight = torch.randn(2, 4, 8, requires_grad=True), torch.randn(20, 8)
    splade_pool(hidden, weight, None, torch.ones(2, 4)).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 4),
    length=st.integers(1, 30),
    width=st.integers(2, 16),
    vocabulary=st.integers(2, 200),
    dead=st.floats(0, 1),
    padding=st.floats(0, 1),
    with_bias=st.booleans(),
    pooling=st.sampled_from(["max", "sum"]),
    double_log=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_of_the_live_terms_alone(batch, length, width, vocabulary, dead, padding, with_bias, pooling, double_log, seed):
    """Outputs and gradients are those of the whole head, whose other rows give nothing: training, and both ways of encoding."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, width, generator=generator)
    live = (torch.rand(vocabulary, generator=generator) >= dead).nonzero()[:, 0]
    weight, bias = torch.zeros(vocabulary, width), torch.full((vocabulary,), -1e4) if with_bias else None
    weight[live] = torch.randn(len(live), width, generator=generator)
    if with_bias:
        bias[live] = torch.randn(len(live), generator=generator)
    mask = (torch.rand(batch, length, generator=generator) >= padding).long()
    upstream = torch.randn(batch, vocabulary, generator=generator)
    upstream[:, torch.isin(torch.arange(vocabulary), live, invert=True)] = 0

    def pool(*inputs):
        return splade_pool(*inputs, live=live)

    of_all = gradients(splade_pool, hidden, weight, bias, mask, pooling, double_log, upstream)
    of_live = gradients(pool, hidden, weight, bias, mask, pooling, double_log, upstream)
    for name, a, b in zip(("output", "hidden", "weight", "bias"), of_live, of_all, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    with torch.no_grad():
        torch.testing.assert_close(pool(hidden, weight, bias, mask, pooling, double_log), of_all[0], rtol=1e-5, atol=1e-5)
        if pooling == "max":
            screened = screened_max(hidden, weight, bias, mask, double_log, live)
            if screened is not None:
                torch.testing.assert_close(screened, of_all[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocabulary", [64, 5000])
def test_bfloat16(vocabulary):
    hidden, weight = torch.randn(2, 9, 16), torch.randn(vocabulary, 16)
    mask = torch.ones(2, 9)
    half = splade_pool(hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_(), None, mask)
    assert half.dtype == torch.bfloat16
    half.sum().backward()
    exact = splade_pool(hidden, weight, None, mask)
    torch.testing.assert_close(half.float(), exact, rtol=0.05, atol=0.05)


def test_the_memory_is_not_batch_length_vocabulary():
    """Of the same step, unfused keeps at least one (batch, length, vocabulary) tensor for backward; fused none."""
    hidden, weight = torch.randn(4, 32, 8, requires_grad=True), torch.randn(3000, 8, requires_grad=True)
    mask = torch.ones(4, 32)
    sizes: dict[str, int] = {}
    for name, function in (("fused", splade_pool), ("unfused", reference)):
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            function(hidden, weight, None, mask)
        sizes[name] = max(kept)
    assert sizes["unfused"] >= 4 * 32 * 3000
    assert sizes["fused"] <= 2 * 4 * 3000


@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_autocast_is_as_near_to_the_truth_as_the_stock_modules_are(pooling):
    torch.manual_seed(0)
    inputs = (
        torch.randn(8, 20, 32),
        torch.randn(2000, 32),
        torch.randn(2000),
        torch.ones(8, 20),
        pooling,
        False,
        torch.ones(8, 2000),
    )
    exact = gradients(reference, *inputs)
    errors = []
    for function in (splade_pool, reference):
        with torch.autocast("cpu", torch.bfloat16):
            results = gradients(function, *inputs)
        assert results[0].dtype == (torch.float32 if function is splade_pool else torch.bfloat16)
        assert results[2].dtype == torch.float32
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(results, exact, strict=True)])
    for fused, stock in zip(*errors, strict=True):
        assert fused <= 1.1 * stock


def test_recomputed_under_gradient_checkpointing():
    hidden, weight, mask = torch.randn(2, 5, 8), torch.randn(30, 8), torch.ones(2, 5)
    plain = gradients(splade_pool, hidden, weight, None, mask, "max", False, torch.ones(2, 30))

    def recomputed(*inputs):
        return checkpoint(splade_pool, *inputs, use_reentrant=False)

    for a, b in zip(gradients(recomputed, hidden, weight, None, mask, "max", False, torch.ones(2, 30)), plain, strict=True):
        assert torch.equal(a, b)


def test_nothing_active_and_nothing_to_learn():
    hidden, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    out = splade_pool(hidden, weight, torch.full((30,), -100.0), torch.ones(2, 5))
    out.sum().backward()
    assert not out.any()
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_inside_a_compiled_function():
    hidden, weight, mask = torch.randn(2, 5, 8), torch.randn(30, 8), torch.ones(2, 5)
    compiled = torch.compile(lambda h: splade_pool(h * 2, weight, None, mask) + 1, backend="eager")
    torch.testing.assert_close(compiled(hidden), splade_pool(hidden * 2, weight, None, mask) + 1)


@pytest.mark.parametrize("native", [True, False])
def test_a_diverged_model_is_seen(native, monkeypatch):
    monkeypatch.setattr(pooling_module, "native_int8", lambda: native)
    hidden, weight = torch.randn(2, 5, 8), torch.randn(300, 8)
    weight[7] = torch.nan
    out = splade_pool(hidden, weight, torch.full((300,), -20.0), torch.ones(2, 5))
    assert out.isnan().nonzero().tolist() == [[0, 7], [1, 7]]
    bias = torch.full((300,), -20.0)
    bias[9] = torch.nan
    assert splade_pool(hidden, torch.randn(300, 8), bias, torch.ones(2, 5)).isnan().nonzero().tolist() == [[0, 9], [1, 9]]
    hidden[0, 2] = torch.nan
    out = splade_pool(hidden, weight, torch.full((300,), -20.0), torch.ones(2, 5))
    assert out[0].isnan().all()
    assert not out[1, :7].isnan().any()
