"""The Triton kernels against a plain reference in float64: on the GPU, or in Triton's interpreter if TRITON_INTERPRET is 1.

``test_kernels`` runs this file in a process of its own, because Triton reads the variable when it is imported.
"""

import os

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import anysplade.model.pooling as pooling_module
from anysplade.model import kernel_pooling
from anysplade.model.kernel_pooling import KernelMaxPool
from anysplade.model.pooling import PoolOptions, _MaxPool, max_logits, splade_pool

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
TYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5 if INTERPRETED else 1e-3, torch.float16: 2e-3, torch.bfloat16: 2e-2}
NAMES = ("result", "hidden", "weight", "bias")

if INTERPRETED:
    import triton_interpreter

    triton_interpreter.correct()
    kernel_pooling.SEGMENT = 64  # small examples, too, have several segments,
    kernel_pooling.GROUP_BYTES = 2**12  # and several groups of texts
torch.backends.cuda.matmul.allow_tf32 = True  # without it, ``pooling`` does not take the kernels for float32
# numpy's, in the interpreter
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")


def example(batch, length, width, vocabulary, seed=0, padding=0.3, level=0.0):
    """Inputs of few digits: their products are exact in every type, so that the maximum and its ties are the same in all."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, high=5):
        return torch.randint(-high, high + 1, shape, generator=generator).double() / 4

    mask = torch.rand(batch, length, generator=generator) >= padding
    return draw(batch, length, width), draw(vocabulary, width), draw(vocabulary) + level, mask, draw(batch, vocabulary, high=9)


def reference(hidden, weight, bias, mask, options):
    """The result in float64; of tokens that tie, the lowest has the maximum."""
    live = slice(None) if options.live is None else options.live
    seen = mask.bool() if options.logs else mask.bool() | (~mask.bool().any(1, keepdim=True) & (torch.arange(mask.shape[1]) == 0))
    logits = hidden @ weight[live].T
    masked = logits.masked_fill(~seen.unsqueeze(2), -torch.inf)
    value = logits.gather(1, first_maximum(masked).unsqueeze(1))[:, 0]
    if bias is not None:
        value = value + bias[live]
    if options.logs:
        value = value.relu().masked_fill(~mask.bool().any(1, keepdim=True), 0)
    for _ in range(options.logs):
        value = value.log1p()
    if options.live is None:
        return value
    return value.new_zeros(len(hidden), len(weight)).index_copy(1, live, value)


def first_maximum(logits):
    length = logits.shape[1]
    tokens = torch.arange(length).view(1, -1, 1).expand_as(logits)
    return tokens.masked_fill(logits != logits.amax(dim=1, keepdim=True), length).amin(dim=1).clamp(max=length - 1)


def run(function, inputs, upstream, options, kind=torch.float64, device="cpu"):
    """The result and the gradients of hidden, weight and bias."""
    hidden, weight, bias, mask = (None if t is None else t.to(device) for t in inputs)
    leaves = [None if t is None else t.to(kind, copy=True).requires_grad_() for t in (hidden, weight, bias)]
    out = function(*leaves, mask, options)
    out.backward(upstream.to(device, out.dtype))
    return [out.detach().cpu(), *(None if leaf is None else leaf.grad.cpu() for leaf in leaves)]


def kernels(inputs, upstream, options, kind):
    live = None if options.live is None else options.live.to(DEVICE)
    return run(KernelMaxPool.apply, inputs, upstream, options._replace(dtype=kind, live=live), kind, DEVICE)


def assert_agree(found, expected, kind):
    for name, a, b in zip(NAMES, found, expected, strict=True):
        if b is None:
            continue
        assert a.dtype == kind
        error = (a.double() - b).norm() / b.norm().clamp(min=1)
        assert error <= TOLERANCE[kind], (name, float(error))


@pytest.mark.parametrize("kind", TYPES[::2])
@pytest.mark.parametrize(
    "batch, length, width, vocabulary, logs, with_bias, dead",
    [
        (1, 1, 1, 1, 1, True, 0),
        (19, 5, 24, 129, 1, True, 0),  # texts that share a program; one term beyond a tile
        (3, 33, 200, 140, 2, False, 0),  # two blocks of tokens, several steps over a width that is not a power of two
        (2, 130, 64, 70, 0, True, 0),  # the logits themselves; three buckets of tokens
        (3, 20, 17, 300, 1, True, 0.5),  # half the terms switched off
    ],
)
def test_agrees_with_the_reference(kind, batch, length, width, vocabulary, logs, with_bias, dead):
    hidden, weight, bias, mask, upstream = example(batch, length, width, vocabulary)
    live = (torch.arange(vocabulary) % 7 >= 7 * dead).nonzero()[:, 0] if dead else None
    options = PoolOptions(logs, kind, True, live)
    inputs = (hidden, weight, bias if with_bias else None, mask)
    assert_agree(kernels(inputs, upstream, options, kind), run(reference, inputs, upstream, options), kind)


@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])  # shrinking takes minutes
@given(
    batch=st.integers(1, 9),
    length=st.integers(1, 40),
    width=st.integers(1, 40),
    vocabulary=st.integers(1, 150),
    level=st.sampled_from([-100.0, -2.0, 0.0, 100.0]),
    padding=st.sampled_from([0.0, 0.4, 0.95]),
    logs=st.integers(0, 2),
    kind=st.sampled_from(TYPES),
    seed=st.integers(0, 2**16),
)
def test_any_shape(batch, length, width, vocabulary, level, padding, logs, kind, seed):
    *inputs, upstream = example(batch, length, width, vocabulary, seed, padding, level)
    options = PoolOptions(logs, kind, True, None)
    assert_agree(kernels(inputs, upstream, options, kind), run(reference, inputs, upstream, options), kind)


@pytest.mark.parametrize("level", [100.0, -100.0])
def test_all_active_and_none(level):
    """Also with an upstream gradient of one number that is expanded."""
    *inputs, _ = example(5, 6, 16, 70, padding=0, level=level)
    options = PoolOptions(1, torch.float32, True, None)
    found = kernels(inputs, torch.ones(()).expand(5, 70), options, torch.float32)
    assert_agree(found, run(reference, inputs, torch.ones(5, 70), options), torch.float32)
    assert (found[0] > 0).all() == (level > 0)
    assert all(gradient.any() == (level > 0) for gradient in found[1:])


def test_the_first_of_equal_tokens_gets_the_gradient():
    """Equal tokens in both blocks of a text, whose first two are padding."""
    hidden, mask = torch.ones(2, 130, 16), torch.ones(2, 130)
    mask[:, :2] = 0
    inputs = (hidden, torch.ones(20, 16), None, mask)
    to_hidden = kernels(inputs, torch.ones(2, 20), PoolOptions(1, torch.float32, True, None), torch.float32)[1]
    assert to_hidden.abs().sum(2).nonzero()[:, 1].tolist() == [2, 2]


def test_padding_may_hold_anything():
    hidden, weight, bias, mask, upstream = example(4, 20, 16, 40, padding=0.5)
    mask[1] = False
    expected = run(reference, (hidden, weight, bias, mask), upstream, PoolOptions(1, torch.float32, True, None))
    hidden[~mask] = torch.nan
    found = kernels((hidden, weight, bias, mask), upstream, PoolOptions(1, torch.float32, True, None), torch.float32)
    assert_agree(found, expected, torch.float32)
    assert not found[0][1].any()


@pytest.mark.parametrize("kind", TYPES[2:] if INTERPRETED else TYPES)
def test_twice_is_the_same_to_the_bit(kind):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*shape, generator=generator) for shape in ((7, 20, 32), (100, 32), (100,), (7, 20))]
    inputs[3] = inputs[3] > 0
    upstream = torch.randn(7, 100, generator=generator)
    first, again = (kernels(inputs, upstream, PoolOptions(1, kind, True, None), kind) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", ["hidden", "weight", "bias"])
def test_a_diverged_model_is_seen(place, value):
    """Of the result and of the bias's gradient, the same numbers are NaN and infinite as without the kernels."""
    hidden, weight, bias, mask, upstream = example(3, 6, 8, 80, padding=0)
    {"hidden": hidden[1, 3], "weight": weight[7], "bias": bias[9:10]}[place][0] = value
    options = PoolOptions(1, torch.float32, True, None)
    found = kernels((hidden, weight, bias, mask), upstream, options, torch.float32)
    expected = run(_MaxPool.apply, (hidden, weight, bias, mask), upstream, options, torch.float32)
    torch.testing.assert_close(found[0], expected[0], equal_nan=True)
    torch.testing.assert_close(found[3], expected[3], equal_nan=True)
    assert torch.equal(found[2].isnan().any(1), expected[2].isnan().any(1))


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_that_are_needed(needed):
    hidden, weight, bias, mask, upstream = (t.float().to(DEVICE) for t in example(3, 6, 8, 80))
    leaves = [t.clone().requires_grad_(flag) for t, flag in zip((hidden, weight, bias), needed, strict=True)]
    KernelMaxPool.apply(*leaves, mask, PoolOptions(1, torch.float32, True, None)).backward(upstream)
    assert tuple(leaf.grad is not None for leaf in leaves) == needed


# ------------------------------------------------------------------------------- through ``pooling``


@pytest.fixture
def only_kernels(monkeypatch):
    """``pooling`` takes the kernels, as on a GPU, also for float32."""
    monkeypatch.setattr(pooling_module, "_max_pool", lambda *arguments: KernelMaxPool)
    monkeypatch.setattr(pooling_module, "native_int8", lambda: False)


@pytest.mark.usefixtures("only_kernels")
def test_without_gradients_the_result_is_the_same():
    hidden, weight, bias, mask, _ = (t.float().to(DEVICE) for t in example(3, 20, 16, 90))
    kept = splade_pool(hidden.requires_grad_(), weight, bias, mask)
    with torch.no_grad():
        assert torch.equal(splade_pool(hidden, weight, bias, mask), kept)
    compiled = torch.compile(lambda h: splade_pool(h * 2, weight, bias, mask) + 1, backend="eager")
    torch.testing.assert_close(compiled(hidden), splade_pool(hidden * 2, weight, bias, mask) + 1)


@pytest.mark.usefixtures("only_kernels")
def test_under_autocast():
    """Of a width that is padded."""
    hidden, weight, bias, mask, upstream = example(3, 20, 18, 90)
    leaves = [t.float().to(DEVICE).requires_grad_() for t in (hidden, weight, bias)]
    with torch.autocast(DEVICE, torch.bfloat16):
        out = splade_pool(*leaves, mask.to(DEVICE))
    out.backward(upstream.float().to(DEVICE))
    found = [out.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)]
    expected = run(reference, (hidden, weight, bias, mask), upstream, PoolOptions(1, torch.float32, True, None))
    assert all(t.dtype == torch.float32 for t in found)
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-6, atol=1e-6)  # the products are exact
    assert_agree([t.bfloat16() for t in found], expected, torch.bfloat16)


@pytest.mark.usefixtures("only_kernels")
def test_largest_logits_of_a_row_without_tokens():
    hidden, weight, bias, mask, _ = (t.float().to(DEVICE) for t in example(2, 5, 16, 30))
    mask[0] = 0
    torch.testing.assert_close(max_logits(hidden, weight, bias, mask)[0], weight @ hidden[0, 0] + bias)


# ------------------------------------------------------------------------------------- on a GPU only

on_a_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a GPU")


@on_a_gpu
@pytest.mark.parametrize("kind, length", [(torch.float16, 16), (torch.bfloat16, 128), (torch.bfloat16, 300)])
@pytest.mark.parametrize("level", [0.0, -60.0])  # nearly all terms active, and few
def test_a_real_size(kind, length, level):
    *inputs, upstream = example(6, length, 768, 30_522, level=level)
    options = PoolOptions(1, kind, True, None)
    expected = run(reference, inputs, upstream, options)
    found = kernels(inputs, upstream, options, kind)
    assert_agree(found, expected, kind)
    assert all(torch.equal(a, b) for a, b in zip(found, kernels(inputs, upstream, options, kind), strict=True))


@on_a_gpu
def test_the_host_does_not_wait():
    hidden, weight, bias, mask, upstream = (t.bfloat16().cuda() for t in example(4, 20, 64, 1000))
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    splade_pool(*leaves, mask).backward(upstream)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        splade_pool(*leaves, mask).backward(upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
def test_where_the_kernels_run(monkeypatch):
    hidden, weight = torch.ones(2, 4, 16, device="cuda"), torch.ones(20, 16, device="cuda")
    assert pooling_module._max_pool(hidden, weight, None) is KernelMaxPool
    assert pooling_module._max_pool(hidden.double(), weight, None) is _MaxPool
    assert pooling_module._max_pool(hidden.bfloat16(), weight, None) is KernelMaxPool
    assert pooling_module._max_pool(hidden[:0], weight, None) is _MaxPool
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    assert pooling_module._max_pool(hidden, weight, None) is _MaxPool
