"""Corrections after training: shifts of the decoder's bias that reach a target of active dims or a limit of FLOPS."""

import logging
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from sentence_transformers import SparseEncoder

from anysplade.data.collections import Pair
from anysplade.model.encoding import count_truncated, encode
from anysplade.model.head import find_head
from anysplade.model.modules import masked_lm, set_lengths
from anysplade.model.options import Role
from anysplade.model.probe import PROBE_QUERIES
from anysplade.training.config import TrainingConfig

logger = logging.getLogger(__name__)

_TRIM_STEP = 0.005  # precision of the shift
_SAMPLE = 200  # training pairs whose active dims are counted
_BEFORE = 32  # training pairs for the estimate before the training


def _sample(pairs: Sequence[Pair], most: int = _SAMPLE) -> list[Pair]:
    """Evenly spaced training pairs."""
    return [pairs[i] for i in range(0, len(pairs), max(1, len(pairs) // most))][:most]


def warn_of_missed_targets(config: TrainingConfig, dims: tuple[float, float]) -> None:
    targets = (config.query_active_dims, config.document_active_dims)
    for role, measured, target in zip(("query", "document"), dims, targets, strict=True):
        if target is not None and not 0.9 <= measured / target <= 1.1:
            logger.warning(
                "the model ends with %.0f %s active dims, the target was %g: more steps bring it nearer, but a target far above "
                "the active dims without a regularizer cannot be met",
                measured,
                role,
                target,
            )


def active_dims(encoder: SparseEncoder, pairs: Sequence[Pair]) -> tuple[float, float]:
    """Mean active dims of queries and of documents, over a sample of the training pairs."""
    sample = _sample(pairs)
    queries = encode(encoder, [pair.query for pair in sample], "query")
    documents = encode(encoder, [pair.positive for pair in sample], "document")
    return queries.nnz / len(sample), documents.nnz / len(sample)


def batch_target(encoder: SparseEncoder, pairs: Sequence[Pair], lengths: Sequence[int], role: Role, target: float) -> float:
    """The active dims of texts as the training truncates them, when they have ``target`` at their full ``lengths``.

    This is estimated on a small sample with the untrained model: counted are the largest weights, as many as give the full texts
    ``target`` active dims. ``trim_level`` corrects the error of the estimate.
    """
    texts = [pair.query if role == "query" else pair.positive for pair in _sample(pairs, _BEFORE)]
    if not count_truncated(encoder, texts, role).texts:
        return target
    cut = encode(encoder, texts, role).data
    before = set_lengths(encoder, lengths)
    whole = np.sort(encode(encoder, texts, role).data)[::-1]
    set_lengths(encoder, before)
    most = min(len(whole), round(target * len(texts)))
    return target * max(1, int((cut >= whole[most - 1]).sum())) / most if most else target


def trim_level(encoder: SparseEncoder, pairs: Sequence[Pair], targets: tuple[float | None, float | None]) -> float:
    """Shift the decoder's bias by at most 1, so that a sample of the training texts meets the targets of active dims.

    At the end of the training the learning rate, and with it the regularizer's influence, is near 0; a constant shift corrects the
    remaining error. With two targets, the larger error on a logarithmic scale is minimized. Because active dims are counted,
    this works with any pooling and activation; it takes nine encodings of the sample.
    """
    biases = find_head(masked_lm(encoder)).biases
    if targets == (None, None) or not biases:
        return 0.0
    before = [bias.detach().clone() for bias in biases]
    errors: dict[float, list[float]] = {}  # of each target, by shift
    low, high = -1.0, 1.0
    while high - low > _TRIM_STEP:
        shift = (low + high) / 2  # 0 is the first, so the result is never worse than no shift
        _shift(biases, before, shift)
        dims = active_dims(encoder, pairs)
        errors[shift] = [math.log(max(n, 1e-3) / target) for n, target in zip(dims, targets, strict=True) if target is not None]
        too_many = max(errors[shift]) + min(errors[shift]) > 0  # errors decrease with the shift, so this changes once
        low, high = (shift, high) if too_many else (low, shift)
    best = min(errors, key=lambda shift: max(map(abs, errors[shift])))
    _shift(biases, before, best)
    return best


def flops(encoder: SparseEncoder, pairs: Sequence[Pair]) -> np.ndarray:
    """The expected number of products for a query and a document (arXiv 2004.05665), by kind of queries, (2,).

    The queries are those of a sample of the training pairs, and everyday queries. A model can become more expensive on one kind
    and cheaper on the other, and users' queries are like neither.
    """
    sample = _sample(pairs)
    documents = encode(encoder, [pair.positive for pair in sample], "document").getnnz(axis=0)
    queries = (encode(encoder, texts, "query") for texts in ([pair.query for pair in sample], PROBE_QUERIES))
    return np.array([rows.getnnz(axis=0) @ documents / (rows.shape[0] * len(sample)) for rows in queries])


def trim_flops(encoder: SparseEncoder, pairs: Sequence[Pair], most: np.ndarray) -> float:
    """Lower the decoder's bias as little as possible, by at most 1, until ``flops`` is at most ``most``, (2,)."""
    biases = find_head(masked_lm(encoder)).biases
    if not biases or (flops(encoder, pairs) <= most).all():
        return 0.0
    before = [bias.detach().clone() for bias in biases]
    low, high = 0.0, 1.0
    while high - low > _TRIM_STEP:
        shift = (low + high) / 2
        _shift(biases, before, shift)
        low, high = (low, shift) if (flops(encoder, pairs) <= most).all() else (shift, high)
    _shift(biases, before, high)
    return high


@torch.no_grad()
def _shift(biases: Iterable[torch.Tensor], before: Iterable[torch.Tensor], by: float) -> None:
    for bias, value in zip(biases, before, strict=True):
        bias.copy_(value - by)
