"""The level of the head after training: a last correction towards the wanted active dims."""

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

_TRIM_STEP = 0.005  # of the shift that corrects active dims after training
_SAMPLE = 200  # training pairs whose active dims are counted
_BEFORE = 32  # training pairs of which that is done before the training


def _sample(pairs: Sequence[Pair], most: int = _SAMPLE) -> list[Pair]:
    """Evenly spaced training pairs."""
    step = max(1, len(pairs) // most)
    return [pairs[i] for i in range(0, len(pairs), step)][:most]


def warn_of_missed_targets(config: TrainingConfig, dims: tuple[float, float]) -> None:
    targets = (config.query_active_dims, config.document_active_dims)
    for role, measured, target in zip(("query", "document"), dims, targets, strict=True):
        if target is not None and not 0.9 <= measured / target <= 1.1:
            logger.warning(
                "the model ends with %.0f %s active dims, the target was %g: more steps bring it nearer, and a target far "
                "above what the model uses without a regularizer cannot be met",
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
    """The active dims that texts have as the training cuts them, where they have ``target`` when they are read to ``lengths``.

    It is estimated from the model before its training, on a small sample: only the largest weights are counted, as many as
    give the whole texts ``target`` active dims. What it is wrong by, ``trim_level`` corrects.
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
    """Shift the decoder's bias by at most 1 so that a sample of the training texts meets the targets of active dims.

    The regularizer's weight loses its force as the learning rate falls to 0; one constant corrects what is
    left. Of two targets it makes the larger error, on a logarithmic scale, as small as it can be. Active dims are
    counted, so that any pooling and activation will do: nine encodings of the sample, 400 texts each.
    """
    biases = find_head(masked_lm(encoder)).biases
    if targets == (None, None) or not biases:
        return 0.0
    before = [bias.detach().clone() for bias in biases]
    errors: dict[float, list[float]] = {}  # by shift, of each target
    low, high = -1.0, 1.0
    while high - low > _TRIM_STEP:
        shift = (low + high) / 2  # 0 first: the result is never worse than no shift
        _shift(biases, before, shift)
        dims = active_dims(encoder, pairs)
        errors[shift] = [math.log(max(n, 1e-3) / target) for n, target in zip(dims, targets, strict=True) if target is not None]
        if max(errors[shift]) + min(errors[shift]) > 0:  # fewer dims with each shift, so this changes its sign once
            low = shift
        else:
            high = shift
    best = min(errors, key=lambda shift: max(map(abs, errors[shift])))
    _shift(biases, before, best)
    return best


def flops(encoder: SparseEncoder, pairs: Sequence[Pair]) -> np.ndarray:
    """Expected products of a query and a document (arXiv 2004.05665): of a sample of the training pairs, and of everyday queries.

    Users' queries are neither, and a model can become costlier on one kind while it becomes cheaper on the other.

    Returns:
        (2,): by kind of queries.
    """
    sample = _sample(pairs)
    documents = encode(encoder, [pair.positive for pair in sample], "document").getnnz(axis=0)
    queries = (encode(encoder, texts, "query") for texts in ([pair.query for pair in sample], PROBE_QUERIES))
    return np.array([rows.getnnz(axis=0) @ documents / (rows.shape[0] * len(sample)) for rows in queries])


def trim_flops(encoder: SparseEncoder, pairs: Sequence[Pair], most: np.ndarray) -> float:
    """Lower the decoder's bias by as little as it takes, at most 1, for no more ``flops`` than ``most`` of either kind, (2,)."""
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
