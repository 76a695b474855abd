"""Regularizers that make vectors sparse, and a controller that sets their weights to meet a target.

The regularizers are for sentence-transformers' ``SpladeLoss``. They are functions of the vectors of a batch, (texts, vocabulary).
With several processes the batch is that of all, so the same weight gives the same sparsity with any number of processes.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.callbacks.splade_callbacks import SpladeRegularizerWeightSchedulerCallback
from sentence_transformers.sparse_encoder.losses import FlopsLoss, SpladeLoss
from sentence_transformers.util.distributed import all_gather_with_grad, get_world_size
from torch import Tensor, nn
from transformers.trainer_callback import ExportableState

from anysplade.training.config import Regularizer
from anysplade.training.observers import ObservedLoss


def _over_processes(mean: Tensor) -> Tensor:
    """The mean over all processes of each process's mean, with gradients to all."""
    return mean if get_world_size() == 1 else all_gather_with_grad(mean[None]).mean(dim=0)


class GatheredFlopsLoss(FlopsLoss):
    """FLOPS (Paria et al., arXiv 2004.05665) of the batch of all processes: sum over terms of the squared mean weight.

    The mean of each process's own FLOPS would be larger, the more so with few texts per process.
    """

    def compute_loss_from_embeddings(self, embeddings: Tensor) -> Tensor:
        return _over_processes(embeddings.mean(dim=0)).square().sum()


class L1Loss(nn.Module):
    """Mean L1 norm of the vectors; it lowers all weights equally, however common the term is."""

    def compute_loss_from_embeddings(self, embeddings: Tensor) -> Tensor:
        return _over_processes(embeddings.abs().sum(dim=1).mean())


class DFFlopsLoss(nn.Module):
    """FLOPS with each term weighted by its document frequency (Porco et al., arXiv 2505.15070).

    ``sum over terms of (w mean)²`` with ``w = 1 / (1 + (DF^(log_α 2) - 1)^β)``: 0 for a rare term, 1/2 at a document frequency of
    α, 1 for a term in every document. The paper takes DF from a validation set every 100 steps; here it is a running average
    over the training batches, in which ``memory`` is the weight of the past.
    """

    def __init__(self, alpha: float = 0.1, beta: float = 10.0, memory: float = 0.98) -> None:
        super().__init__()
        self.exponent = math.log(2) / math.log(alpha)
        self.beta = beta
        self.memory = memory
        self.frequency: Tensor | None = None  # (vocabulary,)

    def compute_loss_from_embeddings(self, embeddings: Tensor) -> Tensor:
        with torch.no_grad():
            seen = _over_processes((embeddings > 0).float().mean(dim=0))
            if self.frequency is None:
                self.frequency = seen
            else:
                self.frequency = self.memory * self.frequency + (1 - self.memory) * seen
            ratio = self.frequency.to(_exact(seen.device)).clamp(min=1e-9) ** self.exponent - 1
            weight = (1 / (1 + ratio.clamp(min=0) ** self.beta)).to(embeddings.dtype)
        return (weight * _over_processes(embeddings.mean(dim=0))).square().sum()


def make_regularizer(name: Regularizer, encoder: SparseEncoder) -> nn.Module:
    if name == "flops":
        return GatheredFlopsLoss(encoder)
    return L1Loss() if name == "l1" else DFFlopsLoss()


# ------------------------------------------------------------------------------- sparsity as a target

_RAMP = 1 / 3  # share of the steps in which the set point moves from the first active dims to the target
_INTEGRAL = 40.0  # e-folds of the weight over a whole run at an error of one e-fold
_PROPORTIONAL = 2.0  # e-folds of the weight at that error, at once
_SMOOTHING = 0.8  # weight of the past in the running average of active dims
_INERT = 0.1  # lowest weight, as a share of the first
_FIRST_SHARE = 1e-2  # first value of the regularizer, as a share of the ranking loss of a model that only guesses


def _exact(device: torch.device) -> torch.dtype:
    """float64, except on MPS, which has none; there df-flops has an error of 4e-6."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass
class _Side:
    """The control loop for queries or for documents. Its numbers stay on the device, so that no step waits for them."""

    target: float
    weight: Tensor | None = None  # set by the first batch
    active: Tensor | None = None  # running average of the active dims
    first: Tensor | None = None  # active dims of the first batch
    inert: Tensor | None = None  # lowest weight; it has almost no effect, and recovery from a lower one would take longer

    @classmethod
    def restored(cls, saved: dict[str, Any], device: torch.device) -> "_Side":
        """A side from its ``state``."""
        side = cls(saved["target"])
        for name in ("weight", "active", "first", "inert"):
            if saved[name] is not None:
                setattr(side, name, torch.tensor(saved[name], dtype=_exact(device), device=device))
        return side

    def state(self) -> dict[str, float | None]:
        """The numbers for a checkpoint."""
        return {name: value.item() if isinstance(value, Tensor) else value for name, value in vars(self).items()}

    def measure(self, vectors: Tensor, regularizer_value: Tensor, chance: float) -> None:
        exact = _exact(vectors.device)
        active = _over_processes((vectors > 0).sum() / len(vectors)).to(exact)
        if self.active is None:
            self.active = self.first = active.clamp(min=1.0)
            self.weight = _FIRST_SHARE * chance / regularizer_value.to(exact).clamp(min=1e-9)
            self.inert = _INERT * self.weight
        else:
            self.active = _SMOOTHING * self.active + (1 - _SMOOTHING) * active

    def control(self, progress: float, step_share: float, speed: float) -> Tensor | float:
        """The weight for the next step; ``progress`` and ``step_share`` are shares of the run, ``speed`` of the peak rate."""
        if self.weight is None or self.active is None or self.first is None or self.inert is None:
            return 0.0
        ramp = min(1.0, progress / _RAMP)
        set_point = self.first.log() * (1 - ramp) + math.log(self.target) * ramp
        error = (self.active.clamp(min=1e-3).log() - set_point).clamp(-1.0, 1.0)
        self.weight = torch.maximum(self.inert, self.weight * (_INTEGRAL * step_share * speed * error).exp())
        return (self.weight * (_PROPORTIONAL * error).exp()).float()  # a regularizer in float32 must not become float64


class ActiveDimsController(SpladeRegularizerWeightSchedulerCallback, ExportableState):
    """Sets a ``SpladeLoss``'s regularizer weights during training so that vectors reach the wanted active dims.

    A proportional-integral controller on a logarithmic scale: the error is the logarithm of the ratio of measured to wanted active
    dims. The wanted number moves from that of the first batch to the target in the first third of the steps. Without a
    target, the weight follows sentence-transformers' quadratic ramp. This callback replaces the trainer's own.
    """

    def __init__(self, loss: SpladeLoss, query_active_dims: float | None, document_active_dims: float | None) -> None:
        super().__init__(loss)
        targets = {"query": query_active_dims, "document": document_active_dims}
        self.sides = {role: _Side(float(target)) for role, target in targets.items() if target is not None}
        self._regularizers: dict[str, Any] = {role: getattr(loss, f"{role}_regularizer") for role in targets}
        for role in self.sides:
            setattr(loss, f"{role}_regularizer", ObservedLoss(self._regularizers[role], partial(self._measure, role)))

    def _measure(self, role: str, vectors: Tensor, value: Tensor) -> None:
        if torch.is_grad_enabled():
            texts = len(vectors) * get_world_size()
            self.sides[role].measure(vectors.detach(), value.detach(), math.log(max(2, texts)))

    def state(self) -> dict[str, Any]:
        """The state that the trainer stores in checkpoints."""
        sides = {role: side.state() for role, side in self.sides.items()}
        frequencies = {
            role: regularizer.frequency.tolist()
            for role, regularizer in self._regularizers.items()
            if isinstance(regularizer, DFFlopsLoss) and regularizer.frequency is not None
        }
        return {"sides": sides, "frequency": frequencies}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and saved:
            self.sides = {role: _Side.restored(side, args.device) for role, side in saved["sides"].items()}
            for role, frequency in saved["frequency"].items():
                self._regularizers[role].frequency = torch.tensor(frequency, device=args.device)

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        super().on_step_begin(args, state, control, **kwargs)
        speed = optimizer.param_groups[0]["lr"] / optimizer.param_groups[0]["initial_lr"]
        for role, side in self.sides.items():
            weight = side.control(state.global_step / state.max_steps, 1 / state.max_steps, speed)
            setattr(self.loss, f"{role}_regularizer_weight", weight)

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any) -> None:
        super().on_log(args, state, control, model, logs, **kwargs)
        for name in (f"{role}_regularizer_weight" for role in self.sides):
            logs[name] = float(getattr(self.loss, name))
