"""The training objectives: sentence-transformers' sparse losses and losses with a teacher, alone or as a weighted sum."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.losses import (
    CachedSpladeLoss,
    SparseDistillKLDivLoss,
    SparseMarginMSELoss,
    SparseMultipleNegativesRankingLoss,
    SpladeLoss,
)
from sentence_transformers.util import dot_score
from sentence_transformers.util.distributed import all_gather, all_gather_with_grad, get_rank, get_world_size
from torch import Tensor, nn

from anysplade.data.collections import Pair
from anysplade.errors import DataError
from anysplade.model.modules import has_static_queries
from anysplade.training.config import TrainingConfig, parse_objective
from anysplade.training.regularization import make_regularizer
from anysplade.training.teacher_scores import BatchTeacher

logger = logging.getLogger(__name__)

_FLAT = 0.05  # certainty of a teacher's first choice, from 0 (guessing) to 1, below which it counts as undecided


class _WeightedSum(nn.Module):
    """A weighted sum of ranking losses."""

    def __init__(self, losses: dict[str, nn.Module], weights: dict[str, float]) -> None:
        super().__init__()
        self.losses: Any = nn.ModuleDict(losses)
        self.weights = weights

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> dict[str, Tensor]:
        return {
            f"{name}_loss": weight * self.losses[name].compute_loss_from_embeddings(embeddings, labels)
            for name, weight in self.weights.items()
        }

    def get_config_dict(self) -> dict[str, object]:
        return {f"{name}_weight": weight for name, weight in self.weights.items()}


class TaughtContrastiveLoss(SparseMultipleNegativesRankingLoss):
    """Contrastive loss without probable false negatives: documents that the teacher scores above the query's positive."""

    def __init__(self, encoder: SparseEncoder, teacher: BatchTeacher, **options: Any) -> None:
        super().__init__(encoder, **options)
        self.teacher = teacher

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """``labels`` are the examples' numbers, (batch,); the rest is as in the parent."""
        scores, own = _teach(self.teacher, labels)
        false = scores > scores.gather(1, own[:, None])
        self.similarity_fct = lambda queries, documents: dot_score(queries, documents).masked_fill(false, -torch.inf)
        try:
            return super().compute_loss_from_embeddings(embeddings, labels)
        finally:
            self.similarity_fct = dot_score


class TeacherLoss(nn.Module):
    """KL(teacher ‖ model) for each query, over the documents of the batch that have a teacher's score.

    ``temperature`` divides the model's scores, ``teacher_temperature`` the teacher's.
    """

    def __init__(self, teacher: BatchTeacher, temperature: float, teacher_temperature: float) -> None:
        super().__init__()
        self.teacher = teacher
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """``embeddings`` are queries, positives and negatives, (batch, vocabulary) each; ``labels`` are the examples' numbers."""
        wanted, _ = _teach(self.teacher, labels)
        unknown = wanted.isnan()
        documents = embeddings[1:]
        if get_world_size() > 1:
            documents = [all_gather_with_grad(column) for column in documents]
        scores = dot_score(embeddings[0], torch.cat(documents)).float() / self.temperature
        log_shares = scores.masked_fill(unknown, -torch.inf).log_softmax(dim=1).masked_fill(unknown, 0)
        log_wanted = (wanted / self.teacher_temperature).masked_fill(unknown, -torch.inf).log_softmax(dim=1)
        return (log_wanted.exp() * (log_wanted.masked_fill(unknown, 0) - log_shares)).sum(dim=1).mean()

    def get_config_dict(self) -> dict[str, object]:
        return {"temperature": self.temperature, "teacher_temperature": self.teacher_temperature}


def _teach(teacher: BatchTeacher, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's scores, (queries of this process, documents of all), and the column of each query's positive.

    ``numbers`` are those of the examples, or the scores if there is one process.
    """
    if numbers.ndim == 2:
        return numbers, torch.arange(len(numbers), device=numbers.device)
    everywhere = all_gather(numbers) if get_world_size() > 1 else numbers
    own = torch.arange(len(numbers), device=numbers.device) + (get_rank() * len(numbers) if get_world_size() > 1 else 0)
    scores = teacher.scores(numbers.cpu().numpy(), everywhere.cpu().numpy())
    return torch.from_numpy(np.ascontiguousarray(scores)).to(numbers.device), own


def make_loss(config: TrainingConfig, encoder: SparseEncoder, teacher: BatchTeacher | None = None) -> SpladeLoss:
    """The config's loss with regularizers; its attribute ``loss`` is the ranking loss.

    With a teacher, the labels of a batch are the examples' numbers, or the teacher's scores, (batch, documents).
    """
    weights = parse_objective(config.objective)
    losses: dict[str, nn.Module] = {}
    for name in weights:
        if name == "contrastive":
            kind = SparseMultipleNegativesRankingLoss if teacher is None else partial(TaughtContrastiveLoss, teacher=teacher)
            losses[name] = kind(encoder, scale=1 / config.temperature, gather_across_devices=get_world_size() > 1)
        elif name == "teacher":
            assert teacher is not None  # the config requires one
            losses[name] = TeacherLoss(teacher, config.temperature, config.teacher_temperature or teacher.temperature)
        elif name == "margin-mse":
            losses[name] = SparseMarginMSELoss(encoder)
        else:
            losses[name] = SparseDistillKLDivLoss(
                encoder, temperature=config.kl_temperature, teacher_temperature=config.teacher_temperature
            )
    ranking: Any = next(iter(losses.values())) if list(weights.values()) == [1.0] else _WeightedSum(losses, weights)
    options: dict[str, Any] = {
        f"{role}_regularizer": make_regularizer(config.regularizer, encoder) for role in ("document", "query")
    }
    options["document_regularizer_weight"] = config.document_regularizer_weight
    options["query_regularizer_weight"] = None if has_static_queries(encoder) else config.query_regularizer_weight
    if config.mini_batch_size is not None:
        return CachedSpladeLoss(encoder, ranking, mini_batch_size=config.mini_batch_size, **options)
    return SpladeLoss(encoder, ranking, **options)


def check_examples(config: TrainingConfig, pairs: Sequence[Pair]) -> None:
    """Raise DataError if the objective cannot use the first examples, and warn if the teacher's scores do not suit it."""
    weights = parse_objective(config.objective)
    negatives, scores = len(pairs[0].negatives), len(pairs[0].scores or ())
    distilled = [name for name in weights if name in ("margin-mse", "kl")]
    if distilled and not negatives:
        raise DataError(f"{config.data}: no negatives, which {distilled[0]} needs; anysplade mine finds some")
    if distilled and not scores:
        raise DataError(f"{config.data}: no scores, which {distilled[0]} learns from; anysplade score has a teacher give them")
    if "kl" in weights and scores == negatives:
        raise DataError(f"{config.data}: one score for each negative is a margin; kl needs the positive's score too")
    if not distilled:
        if scores:
            logger.info("%s: the scores are not used by the objective %s", config.data, config.objective)
        return
    given = np.array([pair.scores for pair in pairs])  # (examples, negatives or 1 + negatives)
    if "margin-mse" in weights:
        margins = given if scores == negatives else given[:, :1] - given[:, 1:]
        if np.abs(margins).max() <= 1:
            logger.warning(
                "%s: the teacher's margins are in [%.2g, %.2g], and MarginMSE needs margins of raw scores, several units wide; "
                "use the teacher's logits instead of probabilities, or `objective=kl`, or vectors will shrink to nothing",
                config.data,
                margins.min(),
                margins.max(),
            )
    if "kl" in weights:
        temperature = config.teacher_temperature or config.kl_temperature
        best = float(softmax(given / temperature, axis=1).max(axis=1).mean())  # mean probability of the first choice
        guess = 1 / given.shape[1]
        if best - guess < _FLAT * (1 - guess) or best > 0.999:
            spread = float(given.std(axis=1).mean())
            logger.warning(
                "%s: at temperature %g the teacher is %s (its first choice gets %.1f %%); the standard "
                "deviation of an example's scores is %.2g, so try `teacher_temperature=%.2g`",
                config.data,
                temperature,
                "sure of one document" if best > 0.999 else "as good as undecided",
                100 * best,
                spread,
                max(spread, 1e-3),
            )
