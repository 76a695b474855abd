import pytest
import torch
from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss

from anysplade import load_encoder
from anysplade.training.regularization import ActiveDimsController, DFFlopsLoss, GatheredFlopsLoss, L1Loss, _Side, make_regularizer


def test_l1():
    assert L1Loss().compute_loss_from_embeddings(torch.tensor([[1.0, 2.0], [0.0, 3.0]])) == 3.0


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
        side.measure(vectors, regularizer_value=50.0, chance=2.8)
        speed = 1 - step / steps  # of a learning rate that falls to 0
        weight = side.control(step / steps, 1 / steps, speed)
        steady = 600.0 / (1 + strength * weight) ** 0.7
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
    loss.document_regularizer.compute_loss_from_embeddings(torch.ones(2, 149))
    controller.on_step_begin(None, State, None, optimizer=optimizer)
    assert loss.document_regularizer_weight > 0
