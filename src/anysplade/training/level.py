"""Corrections after training: shifts of the decoder's bias that reach a target of active dims or a limit of FLOPS."""

import logging
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from scipy import sparse
from sentence_transformers import SparseEncoder

from anysplade.data.collections import Pair
from anysplade.model.encoding import encode, encode_counted
from anysplade.model.head import find_head
from anysplade.model.modules import has_static_queries, masked_lm, set_lengths, splade_modules
from anysplade.model.options import Role
from anysplade.model.own_words import PieceCounts
from anysplade.model.probe import PROBE_QUERIES
from anysplade.model.tokenizing import count_truncated
from anysplade.training.config import TrainingConfig
from anysplade.training.own_words import ROLES, piece_weights

logger = logging.getLogger(__name__)

_STEPS = 256  # a shift is a multiple of 1/256
_SAMPLE = 200  # training pairs whose active dims are counted
_BEFORE = 32  # training pairs for the estimate before the training


def _texts(pairs: Sequence[Pair], role: Role, most: int = _SAMPLE) -> list[str]:
    """The queries or the documents of evenly spaced training pairs."""
    count = min(most, len(pairs))
    sample = (pairs[i * len(pairs) // count] for i in range(count))
    return [pair.query if role == "query" else pair.positive for pair in sample]


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


def active_dims(encoder: SparseEncoder, pairs: Sequence[Pair], progress: bool = False) -> tuple[float, float]:
    """Mean active dims of queries and of documents, over a sample of the training pairs."""
    queries, documents, _ = sample_statistics(encoder, pairs, progress)
    return queries, documents


def sample_statistics(
    encoder: SparseEncoder, pairs: Sequence[Pair], progress: bool = False
) -> tuple[float, float, dict[Role, float | None]]:
    """``active_dims``, and own words kept by role, over the same sample; the idf is that of the training."""
    weights = piece_weights(encoder, pairs)
    dims, own = [], {}
    for role in ROLES:
        pieces = PieceCounts(encoder.get_embedding_dimension() or 0)
        what = f"counting the active dims of {'queries' if role == 'query' else 'documents'}"
        vectors = encode_counted(encoder, _texts(pairs, role), role, progress=progress, what=what, pieces=pieces).matrix
        dims.append(vectors.nnz / vectors.shape[0])
        own[role] = pieces.share(weights[role].numpy()) if role in weights else None
    return dims[0], dims[1], own


def batch_target(encoder: SparseEncoder, pairs: Sequence[Pair], lengths: Sequence[int], role: Role, target: float) -> float:
    """The active dims of texts as the training truncates them, when they have ``target`` at their full ``lengths``.

    This is estimated on a small sample with the untrained model: counted are the largest weights, as many as give the full texts
    ``target`` active dims. ``trim_level`` corrects the error of the estimate.
    """
    texts = _texts(pairs, role, _BEFORE)
    if not count_truncated(encoder, texts, role).texts:
        return target
    cut = encode(encoder, texts, role).data
    before = set_lengths(encoder, lengths)
    whole = np.sort(encode(encoder, texts, role).data)[::-1]
    set_lengths(encoder, before)
    most = min(len(whole), round(target * len(texts)))
    return target * max(1, int((cut >= whole[most - 1]).sum())) / most if most else target


def trim_level(
    encoder: SparseEncoder, pairs: Sequence[Pair], targets: tuple[float | None, float | None], progress: bool = False
) -> float:
    """Shift the decoder's bias by at most 1, so that a sample of the training texts meets the targets of active dims.

    At the end of the training the learning rate, and with it the regularizer's influence, is near 0; a constant shift corrects the
    remaining error. With two targets, the larger error on a logarithmic scale is minimized. The sample is encoded once, at the
    highest level; its logits give the active dims at every lower one, for any pooling and activation.
    """
    biases = find_head(masked_lm(encoder)).biases
    if targets == (None, None) or not biases:
        return 0.0
    before = [bias.detach().clone() for bias in biases]
    _shift(biases, before, -1.0)
    roles: tuple[Role, Role] = ("query", "document")
    logits = [np.sort(_pooled_logits(encoder, _texts(pairs, role), role, progress).data) for role in roles]
    count = min(_SAMPLE, len(pairs))
    errors: dict[float, list[float]] = {}  # of each target, by shift
    low, high = -1.0, 1.0
    while high - low > 1 / _STEPS:
        shift = (low + high) / 2  # 0 is the first, so the result is never worse than no shift
        dims = [(len(sorted_) - np.searchsorted(sorted_, shift + 1, "right")) / count for sorted_ in logits]
        errors[shift] = [math.log(max(n, 1e-3) / target) for n, target in zip(dims, targets, strict=True) if target is not None]
        too_many = max(errors[shift]) + min(errors[shift]) > 0  # errors decrease with the shift, so this changes once
        low, high = (shift, high) if too_many else (low, shift)
    best = min(errors, key=lambda shift: max(map(abs, errors[shift])))
    _shift(biases, before, best)
    return best


def _pooled_logits(encoder: SparseEncoder, texts: Sequence[str], role: Role, progress: bool = False) -> sparse.csr_matrix:
    """The largest logit of each term over the tokens of a text where it is above 0; infinity if the query encoder has no logits."""
    pooling = splade_modules(encoder)[1]
    strategy, pooling.pooling_strategy = pooling.pooling_strategy, "max"
    try:
        rows = encode(encoder, texts, role, progress=progress, what=f"measuring the trained model on {role} texts")
    finally:
        pooling.pooling_strategy = strategy
    if role == "query" and has_static_queries(encoder):
        rows.data[:] = np.inf
        return rows
    for _ in range(2 if pooling.activation_function == "log1p_relu" else 1):
        rows.data = np.expm1(rows.data)
    return rows


def flops(encoder: SparseEncoder, pairs: Sequence[Pair]) -> np.ndarray:
    """The expected number of products for a query and a document (arXiv 2004.05665), by kind of queries, (2,).

    The queries are those of a sample of the training pairs, and everyday queries. A model can become more expensive on one kind
    and cheaper on the other, and users' queries are like neither.
    """
    return _flops(_flops_logits(encoder, pairs), 0.0)


def _flops_logits(encoder: SparseEncoder, pairs: Sequence[Pair]) -> list[sparse.csr_matrix]:
    """Logits of a sample's documents and queries, and of the everyday queries."""
    documents = _pooled_logits(encoder, _texts(pairs, "document"), "document")
    return [documents, *(_pooled_logits(encoder, texts, "query") for texts in (_texts(pairs, "query"), PROBE_QUERIES))]


def _flops(logits: Sequence[sparse.csr_matrix], shift: float) -> np.ndarray:
    """``flops`` if ``shift`` is subtracted from the logits."""
    shares = [np.bincount(rows.indices[rows.data > shift], minlength=rows.shape[1]) / rows.shape[0] for rows in logits]
    return np.array([queries @ shares[0] for queries in shares[1:]])


def trim_flops(encoder: SparseEncoder, pairs: Sequence[Pair], most: np.ndarray) -> float:
    """Lower the decoder's bias as little as possible, by at most 1, until ``flops`` is at most ``most``, (2,)."""
    biases = find_head(masked_lm(encoder)).biases
    if not biases:
        return 0.0
    logits = _flops_logits(encoder, pairs)
    shift = bisect_left(range(_STEPS), True, key=lambda step: bool((_flops(logits, step / _STEPS) <= most).all())) / _STEPS
    _shift(biases, biases, shift)
    return shift


@torch.no_grad()
def _shift(biases: Iterable[torch.Tensor], before: Iterable[torch.Tensor], by: float) -> None:
    for bias, value in zip(biases, before, strict=True):
        bias.copy_(value - by)
