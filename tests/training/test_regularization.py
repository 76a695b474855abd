import json
import math

import pytest
import torch
from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss

from anysplade import load_encoder
from anysplade.training import regularization
from anysplade.training.regularization import ActiveDimsController, DFFlopsLoss, GatheredFlopsLoss, L1Loss, _Side, make_regularizer


def test_l1():
    assert L1Loss().compute_loss_from_embeddings(torch.tensor([[1.0, -2.0], [0.0, 3.0]])) == 3.0


def test_flops(backbone):
    vectors = torch.tensor([[1.0, 2.0], [0.0, 4.0]])  # mean weights 1/2 and 3
    assert GatheredFlopsLoss(load_encoder(backbone)).compute_loss_from_embeddings(vectors) == 0.5**2 + 3**2


@pytest.mark.parametrize(
    "alpha, beta, share, weight",
    [  # 1 / (1 + (share^(log_α 2) - 1)^β), the equation of arXiv 2505.15070; log_¼ 2 = -1/2, so that share^(log_¼ 2) = 1 / √share
        (0.25, 1.0, 0.04, 1 / 5),  # 1 / (1 + (5 - 1))
        (0.25, 2.0, 0.04, 1 / 17),  # 1 / (1 + (5 - 1)²)
        (0.25, 1.0, 0.64, 4 / 5),  # 1 / (1 + (1.25 - 1))
        (0.25, 3.0, 0.64, 64 / 65),  # 1 / (1 + (1.25 - 1)³)
        (0.25, 3.0, 0.25, 1 / 2),  # at α, whatever β
        (0.1, 2.0, 0.01, 1 / 10),  # 0.01 is α²: 1 / (1 + (2² - 1)²)
        (0.1, 2.0, 1.0, 1.0),  # a term of every document
    ],
)
def test_the_weight_of_df_flops(alpha, beta, share, weight):
    vectors = torch.zeros(100, 2)
    vectors[: round(100 * share), 1] = 3.0
    loss = DFFlopsLoss(alpha, beta).compute_loss_from_embeddings(vectors)
    assert loss.item() == pytest.approx((weight * 3 * share) ** 2, rel=1e-5)


def test_the_document_frequency_is_a_running_average():
    """1/2 in the first batch and 1/4 in the second give 3/4 * 1/2 + 1/4 * 1/4 = 7/16."""
    regularizer = DFFlopsLoss(alpha=0.25, beta=1.0, memory=0.75)
    regularizer.compute_loss_from_embeddings(torch.tensor([[0.0], [7.0]]))
    loss = regularizer.compute_loss_from_embeddings(torch.tensor([[8.0], [0.0], [0.0], [0.0]]))
    assert regularizer.frequency.tolist() == [7 / 16]
    assert loss.item() == pytest.approx((math.sqrt(7 / 16) * 2) ** 2)  # with β = 1 the weight is √frequency


def test_df_flops_spares_rare_terms_and_presses_common_ones():
    vectors = torch.zeros(100, 3)
    vectors[:1, 0] = vectors[:10, 1] = vectors[:, 2] = 1.0  # in 1, 10 and 100 of 100 documents
    vectors.requires_grad_()
    loss = DFFlopsLoss(alpha=0.1).compute_loss_from_embeddings(vectors)
    assert loss.item() == pytest.approx((0.5 * 0.1) ** 2 + 1.0, rel=1e-4)  # weights 0, 1/2 and 1
    loss.backward()
    assert vectors.grad[0, 0] < 1e-6 * vectors.grad[0, 2]


class OnMPS(torch.Tensor):
    """As on one of Apple's GPUs, which have no float64."""

    device = torch.device("mps")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return result


@pytest.mark.parametrize("name", ["flops", "df-flops", "l1"])
def test_regularizers_work_without_float64(name, backbone):
    encoder = load_encoder(backbone)
    batches = (torch.rand(3, 8, 149, generator=torch.Generator().manual_seed(0)) - 0.5).relu()
    ours, theirs = make_regularizer(name, encoder), make_regularizer(name, encoder)
    for vectors in batches:
        expected = theirs.compute_loss_from_embeddings(vectors).item()
        assert ours.compute_loss_from_embeddings(vectors.as_subclass(OnMPS)).item() == pytest.approx(expected, rel=1e-5)


def test_a_side_works_without_float64():
    vectors = torch.ones(3, 40)
    ours, theirs = _Side(target=10.0), _Side(target=10.0)
    ours.measure(vectors.as_subclass(OnMPS), torch.tensor(5.0).as_subclass(OnMPS), chance=3.0)
    theirs.measure(vectors, torch.tensor(5.0), chance=3.0)
    assert ours.control(0.5, 0.01, 1.0).item() == pytest.approx(theirs.control(0.5, 0.01, 1.0).item(), rel=1e-5)


def test_df_flops_of_vectors_of_zeros():
    vectors = torch.zeros(4, 3, requires_grad=True)
    loss = DFFlopsLoss().compute_loss_from_embeddings(vectors)
    loss.backward()
    assert loss == 0
    assert torch.isfinite(vectors.grad).all()


def test_names(backbone):
    encoder = load_encoder(backbone)
    assert [type(make_regularizer(name, encoder)) for name in ("flops", "df-flops", "l1")] == [
        GatheredFlopsLoss,
        DFFlopsLoss,
        L1Loss,
    ]


def a_side(**numbers):
    return _Side.restored(numbers, torch.device("cpu"))


def test_a_stored_side_is_the_same_again():
    side = _Side(target=50.0)
    assert _Side.restored(side.state(), torch.device("cpu")) == side  # nothing measured yet
    side.measure(torch.rand(3, 10), torch.tensor(5.0), chance=3.0)
    stored = json.loads(json.dumps(side.state()))
    assert _Side.restored(stored, torch.device("cpu")) == side
    before = _Side.restored({"target": 50.0, "weight": None, "active": None, "first": 0.0, "inert": 0.0}, torch.device("cpu"))
    before.measure(torch.ones(3, 10), torch.tensor(5.0), chance=3.0)
    assert before.first == 10  # older versions stored 0 for what was not measured


def test_where_a_side_begins():
    """The regularizer is then a hundredth of the loss of guessing."""
    side = _Side(target=50.0)
    assert side.control(0.0, 0.1, 1.0) == 0  # nothing measured yet
    side.measure(torch.tensor([[0.5, 0.5, 0.0], [0.0, 9.0, 1.0]]), torch.tensor(5.0), chance=3.0)
    assert (side.active, side.first) == (2.0, 2.0)
    assert side.weight.item() * 5.0 == pytest.approx(0.01 * 3.0)
    assert side.inert.item() == pytest.approx(regularization._INERT * side.weight.item())
    weight = side.weight
    side.measure(torch.ones(2, 10), torch.tensor(9.0), chance=9.0)
    smoothing = regularization._SMOOTHING
    assert side.active.item() == pytest.approx(smoothing * 2 + (1 - smoothing) * 10)
    assert (side.first, side.weight) == (2.0, weight)
    empty = _Side(target=50.0)
    empty.measure(torch.zeros(4, 10), torch.tensor(0.0), chance=3.0)
    assert (empty.active, empty.first) == (1.0, 1.0)  # a logarithm is taken of it


@pytest.mark.parametrize(
    "ramp, active, speed, error",
    [  # from 1,000 to 10 active dims; on a logarithmic scale 100 is half of the way
        (0.5, 100 * math.exp(0.5), 1.0, 0.5),
        (0.5, 100 * math.exp(-0.5), 1.0, -0.5),
        (0.0, 1000 * math.exp(0.25), 0.5, 0.25),
        (1.0, 10 * math.exp(0.25), 0.5, 0.25),
        (2.0, 10 * math.exp(0.25), 0.0, 0.25),  # after the ramp
        (1.0, 10_000.0, 1.0, 1.0),  # no error counts for more than 1
        (1.0, 0.0, 1.0, -1.0),
    ],
)
def test_the_rule_by_hand(ramp, active, speed, error):
    """The integral part stays in the weight; the proportional part is in what is given back alone."""
    side = a_side(target=10.0, weight=3.0, active=active, first=1000.0, inert=0.0)
    given = side.control(ramp * regularization._RAMP, 0.01, speed)
    weight = 3.0 * math.exp(regularization._INTEGRAL * 0.01 * speed * error)
    assert side.weight.item() == pytest.approx(weight)
    assert given.item() == pytest.approx(weight * math.exp(regularization._PROPORTIONAL * error))
    assert given.dtype == torch.float32


def test_a_weight_stays_above_what_does_next_to_nothing():
    side = a_side(target=10.0, weight=0.011, active=1.0, first=10.0, inert=0.01)
    side.control(1.0, 0.1, 1.0)
    assert side.weight == 0.01


@pytest.mark.parametrize("steps", [60, 1000])
@pytest.mark.parametrize("target", [30.0, 150.0])
@pytest.mark.parametrize("strength", [1.0, 100.0])
def test_the_rule_meets_its_target_on_a_simple_plant(steps, target, strength):
    """Active dims that answer a weight late, and in proportion to a power of it, from 600."""
    side = _Side(target)
    active = 600.0
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        noisy = active * (1 + 0.05 * torch.randn((), generator=generator).item())
        vectors = torch.zeros(1, 1000)
        vectors[0, : int(noisy)] = 1
        side.measure(vectors, torch.tensor(50.0), chance=2.8)
        speed = 1 - step / steps  # of a learning rate that falls to 0
        weight = side.control(step / steps, 1 / steps, speed)
        steady = 600.0 / (1 + strength * float(weight)) ** 0.7
        active += (steady - active) * min(1.0, 30 * speed / steps)
    assert active == pytest.approx(target, rel=0.1)


def test_a_side_without_a_target_keeps_the_ramp(backbone):
    encoder = load_encoder(backbone)
    loss = SpladeLoss(encoder, SparseMultipleNegativesRankingLoss(encoder), 1e-3, 2e-3)
    controller = ActiveDimsController(loss, None, 50.0)

    class State:
        max_steps, global_step, stateful_callbacks = 30, 0, {}

    controller.on_train_begin(None, State, None)
    assert (loss.query_regularizer_weight, loss.document_regularizer_weight) == (0.0, 0.0)
    State.global_step = 20
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": 0.1, "initial_lr": 0.2}])
    controller.on_step_begin(None, State, None, optimizer=optimizer)
    assert loss.query_regularizer_weight == 2e-3
    assert loss.document_regularizer_weight == 0.0  # nothing measured yet
    loss.document_regularizer.compute_loss_from_embeddings(torch.ones(5, 149))
    (side,) = controller.sides.values()
    assert side.target == 50
    # FLOPS are 149 squares of a mean weight of 1, and guessing among five documents has the loss log 5.
    assert side.weight.item() == pytest.approx(0.01 * math.log(5) / 149)
    other = a_side(**side.state())
    State.global_step = 4
    controller.on_step_begin(None, State, None, optimizer=optimizer)
    assert loss.document_regularizer_weight == other.control(4 / 30, 1 / 30, 0.1 / 0.2) > 0
    logs = {}
    controller.on_log(None, State, None, logs=logs)
    assert logs == {
        "query_regularizer_weight": pytest.approx(2e-3 * (4 / 10) ** 2),
        "document_regularizer_weight": loss.document_regularizer_weight.item(),
    }
    assert {*map(type, logs.values())} == {float}
    with torch.no_grad():  # an evaluation is no step of the training
        loss.document_regularizer.compute_loss_from_embeddings(torch.zeros(5, 149))
    assert side.active == 149
