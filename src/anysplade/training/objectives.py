"""What training optimises: sentence-transformers' sparse losses, alone or as a weighted sum."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.losses import (
    CachedSpladeLoss,
    SparseDistillKLDivLoss,
    SparseMarginMSELoss,
    SparseMultipleNegativesRankingLoss,
    SpladeLoss,
)
from sentence_transformers.util.distributed import get_world_size
from torch import Tensor, nn

from anysplade.data.collections import Pair
from anysplade.errors import DataError
from anysplade.model.encoder import has_static_queries
from anysplade.training.config import TrainingConfig, parse_objective
from anysplade.training.regularization import make_regularizer

logger = logging.getLogger(__name__)

_FLAT = 0.05  # of a teacher's choices: mean distance of the best one's share from that of guessing


class _WeightedSum(nn.Module):
    """Several ranking losses of the same vectors, each times its weight."""

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


def make_loss(config: TrainingConfig, encoder: SparseEncoder) -> SpladeLoss:
    """The ranking loss with the regularizers around it; its ``loss`` is the ranking loss."""
    weights = parse_objective(config.objective)
    losses: dict[str, nn.Module] = {}
    for name in weights:
        if name == "contrastive":
            losses[name] = SparseMultipleNegativesRankingLoss(
                encoder, scale=1 / config.temperature, gather_across_devices=get_world_size() > 1
            )
        elif name == "margin-mse":
            losses[name] = SparseMarginMSELoss(encoder)
        else:
            losses[name] = SparseDistillKLDivLoss(
                encoder, temperature=config.kl_temperature, teacher_temperature=config.teacher_temperature
            )
    ranking: Any = next(iter(losses.values())) if list(weights.values()) == [1.0] else _WeightedSum(losses, weights)
    options: dict[str, Any] = {
        "document_regularizer_weight": config.document_regularizer_weight,
        "query_regularizer_weight": None if has_static_queries(encoder) else config.query_regularizer_weight,
        "document_regularizer": make_regularizer(config.regularizer, encoder),
        "query_regularizer": make_regularizer(config.regularizer, encoder),
    }
    if config.mini_batch_size is not None:
        return CachedSpladeLoss(encoder, ranking, mini_batch_size=config.mini_batch_size, **options)
    return SpladeLoss(encoder, ranking, **options)


def check_examples(config: TrainingConfig, pairs: Sequence[Pair]) -> None:
    """Refuse examples that the objective cannot use, and warn of a teacher whose scores do not fit it.

    Args:
        pairs: the first ones, or a sample; all have as many negatives and scores.

    Raises:
        DataError: no negatives or no scores, or margins where scores are needed.
    """
    weights = parse_objective(config.objective)
    negatives, scores = len(pairs[0].negatives), len(pairs[0].scores or ())
    distilled = [name for name in weights if name != "contrastive"]
    if distilled and not negatives:
        raise DataError(f"{config.data}: no negatives, which {distilled[0]} needs; anysplade mine finds some")
    if distilled and not scores:
        raise DataError(f"{config.data}: no scores, which {distilled[0]} learns from; anysplade score has a teacher give them")
    if "kl" in weights and scores == negatives:
        raise DataError(f"{config.data}: one score for each negative is a margin; kl needs the positive's score too")
    if not distilled:
        if scores:
            logger.info("%s: the scores are not used by the contrastive objective", config.data)
        return
    given = np.array([pair.scores for pair in pairs])  # (examples, negatives or 1 + negatives)
    if "margin-mse" in weights:
        margins = given if scores == negatives else given[:, :1] - given[:, 1:]
        if np.abs(margins).max() <= 1:
            logger.warning(
                "%s: the teacher's margins lie in [%.2g, %.2g], MarginMSE wants those of raw scores, several units wide: "
                "vectors would shrink to nothing; use the teacher's logits instead of probabilities, or `objective=kl`",
                config.data,
                margins.min(),
                margins.max(),
            )
    if "kl" in weights:
        temperature = config.teacher_temperature or config.kl_temperature
        logits = given / temperature
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        best = float((shares.max(axis=1) / shares.sum(axis=1)).mean())  # the teacher's mean certainty of its first choice
        guess = 1 / given.shape[1]
        if best - guess < _FLAT * (1 - guess) or best > 0.999:
            spread = float(given.std(axis=1).mean())
            logger.warning(
                "%s: at temperature %g the teacher is %s (its first choice gets %.1f %%); its scores spread by %.2g an "
                "example, so try `teacher_temperature=%.2g`",
                config.data,
                temperature,
                "sure of one document" if best > 0.999 else "as good as undecided",
                100 * best,
                spread,
                max(spread, 1e-3),
            )
