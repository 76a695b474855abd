"""Measure an MLM head: its norms, and its logits on probe texts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import logsumexp
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anysplade._common.tables import Tabular
from anysplade.errors import OptionError
from anysplade.model.checkpoints import load_masked_lm
from anysplade.model.head import RECORD, find_head, live_terms
from anysplade.model.options import BiasPolicy
from anysplade.model.probe import PROBE_DOCUMENTS, PROBE_QUERIES

_PERCENTILES = (0.1, 1, 5, 25, 50, 75, 95, 99, 99.9)

_BINS = 80  # of the histogram of the logits
_SAMPLED_LOGITS = 2**24  # token logits kept for percentiles: 64 MB in float32
_LOGITS_PER_BATCH = 2**26  # logits computed at once: 256 MB in float32
_PROBE_LENGTH = 256  # tokens of a probe text, the rest is cut


@dataclass(frozen=True)
class Probe:
    """Logits of a head on probe texts, from which any (k, shift) can be judged without another forward pass.

    A per-term affine map commutes with the max over tokens, so the pooled logits are kept raw.
    """

    token_logits: np.ndarray  # (sampled tokens, live terms) float32; special tokens included, padding not
    query_logits: np.ndarray  # (queries, live terms): max over each query's tokens
    document_logits: np.ndarray  # (documents, live terms)
    bias: np.ndarray | None  # (live terms,)

    def affine(self, k: float, shift: float, bias: BiasPolicy) -> "Probe":
        """The probe as it would be after ``rescale_head(k, shift, bias)``."""
        offset: Any = np.float32(-shift)
        if bias == "keep" and self.bias is not None:
            offset = offset + self.bias * np.float32(1 - 1 / k)
        token, query, document = (
            logits / np.float32(k) + offset for logits in (self.token_logits, self.query_logits, self.document_logits)
        )
        return Probe(token, query, document, None)


@dataclass(frozen=True, repr=False)
class ProbeReport(Tabular):
    """The starting point of SPLADE: statistics of a head on probe texts before any training."""

    queries: int
    documents: int
    tokens: int  # sampled for the percentiles and the positive share
    logit_percentiles: dict[str, float]
    positive_share: float  # of all token logits
    query_active_dims: float
    document_active_dims: float
    flops: float  # expected products per (query, document) pair: sum over terms of P(in query) P(in document)
    score_mean: float  # over all (query, document) pairs of the probe
    score_std: float
    document_similarity: float  # mean cosine of two different documents
    start_loss: float | None  # cross-entropy of finding each query's document; None unless query i goes with document i
    chance: float  # cross-entropy of guessing: log(documents)
    histogram: dict[str, list[float]]  # of the token logits: edges (bins + 1), shares (bins)


@dataclass(frozen=True, repr=False)
class HeadReport(Tabular):
    """The MLM head of a masked LM: its shape and norms, and with a tokenizer its effect on probe texts."""

    model: str  # the name that was given
    architecture: str  # class of transformers
    vocabulary: int  # rows of the decoder
    live: int  # rows that are not switched off: terms that a text can have
    width: int  # columns of the decoder
    tied: bool  # the decoder's weight is the input embeddings'
    bias: bool  # the decoder has one
    frobenius_norm: float  # of the decoder's weight
    mean_row_norm: float  # L2, over the live terms
    max_row_norm: float  # L2
    rescaled: dict[str, Any] | None  # what rescale_head recorded in the checkpoint
    folding: dict[str, Any] | None  # what fold_head recorded in the checkpoint
    probe: ProbeReport | None  # None without a tokenizer

    def _rows(self) -> list[dict[str, Any]]:
        """The head and its effect on the probe texts, in one row."""
        return [super()._rows()[0] | ({} if self.probe is None else self.probe._rows()[0])]


def inspect_head(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    queries: Sequence[str] = PROBE_QUERIES,
    documents: Sequence[str] = PROBE_DOCUMENTS,
) -> HeadReport:
    """Measure the MLM head of a masked LM.

    Args:
        model: a folder or hub id, or a loaded masked LM.
        tokenizer: of a loaded model; without it, ``probe`` is None.
        queries: probe texts, by default everyday ones.
        documents: probe texts; document i answers query i.

    Raises:
        ModelError: not a masked LM, or no head.
    """
    if isinstance(model, PreTrainedModel):
        name = model.name_or_path or type(model).__name__
    else:
        name = str(model)
        model, tokenizer = load_masked_lm(model)
    return describe_head(model, None if tokenizer is None else measure_logits(model, tokenizer, queries, documents), name)


def describe_head(model: PreTrainedModel, probe: Probe | None, name: str) -> HeadReport:
    """The report of a loaded masked LM with the given probe."""
    head, live = find_head(model), live_terms(model)
    weight = head.decoder.weight.detach().float()  # (vocabulary, width)
    rows = (weight if live is None else weight[live]).norm(dim=1)
    record = getattr(model.config, RECORD, None) or {}
    return HeadReport(
        model=name,
        architecture=type(model).__name__,
        vocabulary=weight.shape[0],
        live=len(rows),
        width=weight.shape[1],
        tied=head.decoder.weight is model.get_input_embeddings().weight,
        bias=bool(head.biases),
        frobenius_norm=float(weight.norm()),
        mean_row_norm=float(rows.mean()),
        max_row_norm=float(rows.max()),
        rescaled={name: value for name, value in record.items() if name != "folding"} or None,
        folding=record.get("folding"),
        probe=None if probe is None else summarize_probe(probe),
    )


@torch.inference_mode()
def measure_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, queries: Sequence[str], documents: Sequence[str]
) -> Probe:
    """Run the probe texts through the model once; raises OptionError if there are no queries or no documents.

    Memory: about 64 MB of sampled token logits, and the pooled logits, (texts x vocabulary) in float32.
    """
    if not queries or not documents:
        raise OptionError("calibration needs probe texts: at least one query and one document")
    head, live = find_head(model), live_terms(model)
    vocabulary = head.decoder.weight.shape[0]
    limit = min(_PROBE_LENGTH, tokenizer.model_max_length)
    encoded = [
        [ids[:limit] for ids in tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]]
        for texts in (queries, documents)
    ]
    tokens = sum(len(ids) for texts in encoded for ids in texts)
    stride = max(1, math.ceil(tokens * vocabulary / _SAMPLED_LOGITS))
    was_training = model.training
    model.eval()
    sampled: list[np.ndarray] = []
    pooled: list[np.ndarray] = []
    seen = 0
    for texts in encoded:
        rows = np.empty((len(texts), vocabulary if live is None else len(live)), np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        while order:
            longest = len(texts[order[-1]])
            batch = [order.pop() for _ in range(min(len(order), max(1, _LOGITS_PER_BATCH // (longest * vocabulary))))]
            padded = tokenizer.pad({"input_ids": [texts[i] for i in batch]}, return_tensors="pt").to(model.device)
            logits = model(**padded).logits.float()  # (batch, length, vocabulary)
            logits = logits if live is None else logits[..., live]
            mask = padded["attention_mask"].bool()
            rows[batch] = logits.masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(dim=1).cpu().numpy()
            flat = logits[mask]
            # Every stride-th token of the whole stream, across batches: the sample does not depend on the batch size.
            sampled.append(flat[(-seen) % stride :: stride].cpu().numpy())
            seen += len(flat)
        pooled.append(rows)
    model.train(was_training)
    bias = None if head.bias is None else (head.bias if live is None else head.bias[live]).float().cpu().numpy()
    return Probe(np.concatenate(sampled), pooled[0], pooled[1], bias)


def summarize_probe(probe: Probe) -> ProbeReport:
    """Statistics of a probe."""
    queries, documents = (np.log1p(np.maximum(z, 0)) for z in (probe.query_logits, probe.document_logits))
    scores = queries @ documents.T  # (queries, documents)
    levels = np.percentile(probe.token_logits, _PERCENTILES)
    counts, edges = np.histogram(probe.token_logits, _BINS)
    unit = documents / np.maximum(np.linalg.norm(documents, axis=1, keepdims=True), 1e-12)
    n = len(documents)
    start_loss = None
    if scores.shape[0] == n:
        exact = scores.astype(np.float64)
        start_loss = float((logsumexp(exact, axis=1) - exact.diagonal()).mean())
    return ProbeReport(
        queries=len(queries),
        documents=n,
        tokens=len(probe.token_logits),
        logit_percentiles={f"{p:g}": float(v) for p, v in zip(_PERCENTILES, levels, strict=True)},
        positive_share=float((probe.token_logits > 0).mean()),
        query_active_dims=float((queries > 0).sum(axis=1).mean()),
        document_active_dims=float((documents > 0).sum(axis=1).mean()),
        flops=float(((queries > 0).mean(axis=0) * (documents > 0).mean(axis=0)).sum()),
        score_mean=float(scores.mean()),
        score_std=float(scores.std()),
        document_similarity=float((np.square(unit.sum(axis=0)).sum() - (documents.any(axis=1)).sum()) / max(1, n * (n - 1))),
        start_loss=start_loss,
        chance=math.log(n),
        histogram={"edges": edges.tolist(), "shares": (counts / counts.sum()).tolist()},
    )
