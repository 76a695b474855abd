import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from anysplade.model.pooling import splade_pool
from anysplade.model.screening import _screen, _worthwhile_share, screened_max
from architectures import stock_pooling as reference


@settings(max_examples=100, deadline=None)
@given(
    batch=st.integers(1, 4),
    length=st.integers(1, 30),
    width=st.sampled_from([2, 7, 64, 256]),
    vocabulary=st.integers(20, 400),
    share=st.floats(0, 0.04),
    scale=st.floats(0.01, 100),
    padding=st.floats(0, 1),
    double_log=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_screening_in_int8_loses_nothing(batch, length, width, vocabulary, share, scale, padding, double_log, seed):
    """Random heads whose level leaves few entries above zero, many of them by a hair."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, width, generator=generator) * scale
    weight = torch.randn(vocabulary, width, generator=generator)
    mask = torch.rand(batch, length, generator=generator) >= padding
    maxima = (hidden @ weight.T).amax(dim=1).flatten()
    bias = torch.full((vocabulary,), -maxima.quantile(1 - share).item())
    screened = screened_max(hidden, weight, bias, mask, double_log)
    assume(screened is not None)
    expected = reference(hidden.double(), weight.double(), bias.double(), mask, "max", double_log)
    # What float32 rounds in a product of such vectors; the level takes most of it away again.
    rounding = 2**-22 * (hidden.norm(dim=-1).max() * weight.norm(dim=-1).max()).item()
    torch.testing.assert_close(screened.double(), expected, rtol=1e-5, atol=max(1e-5, rounding))


@settings(max_examples=60, deadline=None)
@given(
    width=st.sampled_from([2, 3, 16, 64, 384, 768]),
    steps=st.lists(st.integers(0, 126), min_size=1, max_size=8),
    step=st.floats(1e-3, 10),
    above=st.floats(0.05, 0.9),
    seed=st.integers(0, 2**16),
)
@example(width=64, steps=[1], step=1 / 8, above=0.05, seed=0)
def test_screening_loses_nothing_where_every_rounding_goes_the_same_way(width, steps, step, above, seed):
    """Parallel vectors of numbers a little below the middle of two steps of int8: the bound of Cauchy and Schwarz is met."""
    torch.manual_seed(seed)
    signs = torch.randint(0, 2, (width,)) * 2.0 - 1
    numbers = torch.tensor([127.0] + [steps[i % len(steps)] + 0.49 for i in range(width - 1)])
    hidden = (signs * numbers * step).reshape(1, 1, width)
    weight = torch.zeros(200, width)
    weight[0] = hidden[0, 0]
    exact = float(weight[0].double() @ hidden[0, 0].double())
    rounded = float((numbers.round().double() ** 2).sum() * step**2)
    bias = torch.full((200,), -exact)
    bias[0] = -exact + above * (exact - rounded)  # above zero by less than the rounding takes away
    positive = exact + float(bias[0].double())
    assume(positive > 1e-5 * exact)
    screened = screened_max(hidden, weight, bias, torch.ones(1, 1), False)
    assert screened is not None
    assert screened[0, 0].item() == pytest.approx(math.log1p(positive), rel=1e-2, abs=1e-5 * exact)
    assert not screened[0, 1:].any()


@pytest.mark.parametrize(
    "change",
    [
        lambda weight, optimizer: optimizer.step(),
        lambda weight, optimizer: torch.nn.ParameterList([weight]).load_state_dict({"0": torch.randn(500, 8)}),
        lambda weight, optimizer: setattr(weight, "data", torch.randn(500, 8)),
        lambda weight, optimizer: setattr(weight, "data", weight.data * 2),
    ],
    ids=["optimizer", "load_state_dict", "data", "twice as large"],
)
def test_the_weight_in_int8_is_made_once_and_again_after_a_change(change):
    weight = torch.nn.Parameter(torch.randn(500, 8))
    weight.grad = torch.randn(500, 8)
    optimizer = torch.optim.AdamW([weight], lr=0.5)
    first = _screen(weight)
    assert _screen(weight) is first
    for _ in range(3):  # freed memory may be used again
        change(weight, optimizer)
        torch.testing.assert_close(_screen(weight).rounded * _screen(weight).scale.unsqueeze(1), weight.detach(), rtol=0, atol=0.5)
    assert _screen(weight) is not first


def test_training_drops_the_weight_in_int8():
    weight = torch.nn.Parameter(torch.randn(500, 8))
    first = _screen(weight)
    splade_pool(torch.randn(2, 5, 8), weight, None, torch.ones(2, 5)).sum().backward()
    assert _screen(weight) is not first


@pytest.mark.parametrize("where", ["hidden", "weight"])
def test_screening_gives_way_to_what_is_no_number(where):
    hidden, weight = torch.randn(2, 5, 8), torch.randn(500, 8)
    {"hidden": hidden[1, 3], "weight": weight[7]}[where][2] = torch.nan
    assert screened_max(hidden, weight, torch.full((500,), -50.0), torch.ones(2, 5), False) is None
    assert splade_pool(hidden, weight, None, torch.ones(2, 5)).isnan().any()


def test_screening_gives_way_where_much_is_active():
    assert screened_max(torch.randn(2, 5, 8), torch.randn(50, 8), None, torch.ones(2, 5), False) is None


def test_the_screen_is_that_of_these_terms():
    weight = torch.randn(30, 8)
    some, others = torch.arange(0, 30, 2), torch.arange(1, 30, 2)
    first = _screen(weight, some)
    assert _screen(weight, some.clone()) is first
    assert len(_screen(weight, others[:5]).rounded) == 5
    assert len(_screen(weight).rounded) == 30


@pytest.mark.parametrize("in_bfloat16", [False, True])
@pytest.mark.parametrize("length", [4, 16, 128])
def test_a_sample_of_the_terms_tells_whether_screening_is_worth_it(length, in_bfloat16):
    """The fewer tokens a text has and the faster all products are, the fewer entries may be above zero."""
    torch.manual_seed(0)
    hidden, weight, mask = torch.randn(32, length, 64), torch.randn(3200, 64), torch.ones(32, length)
    maxima = (hidden @ weight.T).amax(dim=1).flatten()
    most = _worthwhile_share(length, in_bfloat16)
    for share, wanted in ((most / 20, True), (min(1.0, 1.5 * most), False)):
        bias = torch.full((3200,), -maxima.kthvalue(max(1, round((1 - share) * len(maxima)))).values.item())
        screened = screened_max(hidden, weight, bias, mask, False, None, in_bfloat16)
        assert (screened is not None) == wanted
        if screened is not None:
            torch.testing.assert_close(screened, reference(hidden, weight, bias, mask, "max", False), rtol=1e-4, atol=1e-4)
    assert _worthwhile_share(length, True) < _worthwhile_share(length, False) < 1
    assert _worthwhile_share(length, in_bfloat16) < _worthwhile_share(2 * length, in_bfloat16)
