"""Detect collapse during a training run: statistics of each batch's vectors, and findings about what is wrong with them.

Findings depend only on the recorded statistics, so a stored run can be diagnosed again.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from sentence_transformers.util.distributed import all_gather, get_world_size
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from anysplade.training.own_words import BatchPieces

logger = logging.getLogger(__name__)

OBSERVATIONS = 200  # at most per run, evenly spaced
_MEMORY = 50  # observations after which an unused term counts as dead
_WINDOW = 5  # observations that must agree, since one odd batch is no finding
_EMPTY = 0.5  # active dims per text, below which vectors count as all zero
_ALIKE = 0.8  # cosine within queries and within documents, above which vectors may be constant
_FLAT = 0.1  # standard deviation of scores, as a share of their mean, below which all documents score the same
_SATURATED = 3.0  # loss, as a multiple of the loss of guessing, above which the softmax counts as saturated
_SETTLED = 10  # observations during which such a loss is normal
_WORDS = 0.6  # share of own words, below which a model that began above has lost them
_CALIBRATE = "calibrate the head (`k=auto` `shift=auto`, the default), or more strongly with `on_collapse=recalibrate`"
_LIGHTER = "lower the regularizer weights or raise the target of active dims"
_RAISE = "the head starts with no term above zero, whatever the regularizer: lower `shift`, or leave it to auto"
_KEEP = "give `own_words` a weight, such as 1, or lower the regularizer weights"
_SLOWER = "lower the learning rate, and calibrate the head (`k=auto` `shift=auto`)"


@dataclass(frozen=True)
class Observation:
    """Statistics of one training batch: n queries and m documents, the positives first."""

    step: int
    loss: float  # ranking loss
    chance: float | None  # contrastive loss of a model that only guesses, log(m); None for other losses
    query_active_dims: float
    document_active_dims: float
    flops: float  # sum over terms of P(in query) P(in document), within the batch
    query_similarity: float  # mean cosine of two different queries of the batch
    document_similarity: float  # the same for documents
    score_mean: float  # over all (query, document) pairs of the batch
    score_std: float
    margin: float  # mean score of the positives minus the mean of all others
    dead_share: float  # share of the vocabulary that no document used in the last 50 observations
    always_on_share: float  # terms in every document of the batch, as a share of a document's active dims
    gradient_norm: float | None = None  # before clipping, from the trainer's log
    query_own_words: float | None = None  # share of the queries' own word pieces that are active, by idf; None if not observed
    document_own_words: float | None = None  # the same for documents


class Pending:
    """An observation whose numbers are still being computed, so that the host can queue further work on the device.

    Reading it waits for the device to reach the observation, not for what was queued after it.
    """

    def __init__(self, step: int, chance: float | None, statistics: Tensor) -> None:
        self.step = step
        self._chance = chance
        self._statistics = statistics
        self._copied: torch.cuda.Event | None = None
        if statistics.device.type == "cuda":
            self._statistics = statistics.to("cpu", non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> Observation:
        if self._copied is not None:
            self._copied.synchronize()
        loss, *others, query_own, document_own = self._statistics.tolist()
        own = [None if math.isnan(share) else share for share in (query_own, document_own)]
        seen = Observation(self.step, loss, self._chance, *others)
        return replace(seen, query_own_words=own[0], document_own_words=own[1])


@torch.no_grad()
def observe(
    embeddings: Sequence[Tensor],
    loss: Tensor,
    last_used: Tensor,
    step: int,
    count: int,
    contrastive: bool = True,
    own_words: Tensor | None = None,
) -> Pending:
    """Compute the statistics of observation number ``count``, of queries, positives and any negatives, (n, vocabulary) each.

    ``last_used``, (vocabulary,), has the number of the observation in which a document last used each term; it is updated.
    ``own_words``, (2,), are those that queries and documents keep; NaN or None if not known.
    """
    queries, positives = embeddings[0].float(), embeddings[1].float()
    documents = torch.cat([embedding.float() for embedding in embeddings[1:]])
    n, m = len(queries), len(documents)
    in_query, in_document = (queries > 0).float(), (documents > 0).float()
    used = in_document.sum(dim=0)  # (vocabulary,)
    last_used.masked_fill_(used > 0, count)
    scores = queries @ documents.T  # (n, m)
    right = scores[:, : len(positives)].diagonal()
    statistics = torch.stack(  # in the order of the fields, for one transfer from the device
        [
            loss.detach().float(),
            in_query.sum() / n,
            used.sum() / m,
            in_query.mean(dim=0) @ (used / m),
            _similarity(queries),
            _similarity(documents),
            scores.mean(),
            scores.std(correction=0),
            right.mean() - (scores.sum() - right.sum()) / max(1, scores.numel() - n),
            (last_used < count - _MEMORY).float().mean(),
            (used == m).sum() / (used.sum() / m).clamp(min=1),
            *(queries.new_full((2,), math.nan) if own_words is None else own_words.float()),
        ]
    )
    return Pending(step, math.log(m) if contrastive else None, statistics)


def _similarity(vectors: Tensor) -> Tensor:
    """Mean cosine of two different rows, without the (rows, rows) matrix; a vector of zeros has cosine 0."""
    n = len(vectors)
    norms = vectors.norm(dim=1, keepdim=True)
    total = (vectors / norms.clamp(min=1e-12)).sum(dim=0).square().sum()
    return (total - (norms > 0).sum()) / max(1, n * (n - 1))


# ------------------------------------------------------------------------------------- diagnosis

Name = Literal["constant vectors", "all zero", "all dense", "divergence", "dead vocabulary", "saturated softmax", "words lost"]


@dataclass(frozen=True)
class Finding:
    """A problem in a run."""

    name: Name
    step: int  # first step that shows it
    evidence: str
    fix: str
    collapse: bool  # whether the run is lost; otherwise it continues with a worse result


def renamed_findings(stored: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Stored findings with today's names: older versions called ``fix`` ``mend``."""
    return [{"fix" if name == "mend" else name: value for name, value in finding.items()} for finding in stored]


def diagnose(observations: Sequence[Observation], vocabulary: int) -> list[Finding]:
    """What is wrong with a run so far, each finding once, at the first step that shows it.

    docs/training.md ("What the monitor sees") explains the thresholds and the runs that they come from.
    """
    findings: dict[Name, Finding] = {}
    for end in range(1, len(observations) + 1):
        for finding in _check(observations[:end], vocabulary):
            findings.setdefault(finding.name, finding)
    return list(findings.values())


def _check(observations: Sequence[Observation], vocabulary: int) -> list[Finding]:
    """What the last observations show together."""
    window = observations[-_WINDOW:]
    now = window[-1]
    gradients = [seen.gradient_norm or 0.0 for seen in window]  # logged after the observation
    numbers = (now.loss, now.score_mean, now.score_std, *gradients)
    if not all(map(math.isfinite, numbers)):
        evidence = f"loss {now.loss:g}, scores {now.score_mean:g} ± {now.score_std:g}, gradient norm {max(gradients, key=abs):g}"
        return [Finding("divergence", now.step, evidence, _SLOWER, True)]
    if len(window) < _WINDOW:
        return []

    def all_of(name: str, low: float = -math.inf, high: float = math.inf) -> bool:
        return all(low <= getattr(seen, name) <= high for seen in window)

    alike = all_of("query_similarity", low=_ALIKE) and all_of("document_similarity", low=_ALIKE)
    found: list[Finding] = []

    def add(name: Name, evidence: str, fix: str, collapse: bool) -> None:
        found.append(Finding(name, now.step, evidence, fix, collapse))

    for role in ("query", "document"):
        if all_of(f"{role}_active_dims", high=_EMPTY):
            fix = _RAISE if getattr(observations[0], f"{role}_active_dims") <= _EMPTY else _LIGHTER
            add("all zero", f"{getattr(now, f'{role}_active_dims'):.2g} active dims per {role}", fix, True)
    if not found and alike and all(seen.score_std < _FLAT * seen.score_mean for seen in window):
        evidence = (
            f"cosine {now.query_similarity:.2f} between queries and {now.document_similarity:.2f} between documents of a batch; "
            f"scores {now.score_mean:.3g} ± {now.score_std:.2g}"
        )
        add("constant vectors", evidence, _CALIBRATE, True)
    if all_of("document_active_dims", low=0.5 * vocabulary):
        share = now.document_active_dims / vocabulary
        add("all dense", f"{share:.0%} of the vocabulary active in a document", _CALIBRATE, False)
    chance = now.chance
    if len(observations) > _SETTLED + _WINDOW and chance and all(seen.loss > _SATURATED * chance for seen in window):
        evidence = f"loss {now.loss:.3g} where guessing gives {chance:.3g}; scores {now.score_mean:.3g} ± {now.score_std:.3g}"
        add("saturated softmax", evidence, _CALIBRATE, True)
    if all_of("dead_share", low=0.995):
        add("dead vocabulary", f"{now.dead_share:.1%} of the terms are used by no recent document", _LIGHTER, False)
    for role, plural in (("query", "queries"), ("document", "documents")):
        name = f"{role}_own_words"
        first, shares = getattr(observations[0], name), [getattr(seen, name) for seen in window]
        is_dense = getattr(observations[0], f"{role}_active_dims") > 0.5 * vocabulary  # and has any word by chance
        lost = all(share is not None and share < _WORDS for share in shares)
        if first is not None and first >= _WORDS and lost and not is_dense:
            evidence = f"{plural} keep {shares[-1]:.0%} of their own words by idf, {first:.0%} at the start"
            add("words lost", evidence, _KEEP, False)
            break
    return found


# -------------------------------------------------------------------------------------- watching


class Monitor(TrainerCallback, ExportableState):
    """Observes a run's batches, reports findings, and with ``stop`` ends the run on collapse.

    ``see`` is the observer of the ranking loss, for ``ObservedLoss``; if it is ``contrastive``, the loss of guessing is known.
    Only the terms with the ids ``live`` are observed, and own words only with ``pieces``. With several processes, each observes
    the whole batch, so all have the same findings. An observation is read at the end of the next step, or when it is logged or
    stored, so that no step waits for its own numbers; a finding is reported, and a run stopped, as late as that.
    """

    def __init__(
        self,
        vocabulary: int,
        stop: bool = False,
        contrastive: bool = True,
        live: Tensor | None = None,
        pieces: BatchPieces | None = None,
    ) -> None:
        self.observations: list[Observation] = []
        self.findings: list[Finding] = []
        self.live = live
        self.vocabulary = vocabulary if live is None else len(live)
        self.stop = stop
        self.contrastive = contrastive
        self.pieces = pieces
        self._pending: list[Pending] = []
        self._last_used: Tensor | None = None
        self._due = False
        self._step = 0

    @property
    def collapsed(self) -> bool:
        return any(finding.collapse for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        return {"findings": list(map(asdict, self.findings)), "observations": list(map(asdict, self.observations))}

    def state(self) -> dict[str, Any]:
        """The state that the trainer stores in checkpoints."""
        self._read()
        return self.to_dict() | {"last_used": None if self._last_used is None else self._last_used.tolist()}

    def see(self, embeddings: list[Tensor], loss: Tensor | dict[str, Tensor]) -> None:
        """Observe a batch, at most one per step."""
        if not self._due:
            return
        self._due = False
        loss = torch.stack(list(loss.values())).sum() if isinstance(loss, dict) else loss
        own = None if self.pieces is None else self.pieces.kept(embeddings)
        if get_world_size() > 1:
            embeddings = [all_gather(embedding.detach().contiguous()) for embedding in embeddings]
            loss = all_gather(loss.detach().reshape(1)).mean()
            own = None if own is None else all_gather(own[None]).mean(dim=0)
        if self.live is not None:
            embeddings = [embedding[:, self.live] for embedding in embeddings]
        if self._last_used is None:
            self._last_used = torch.full((embeddings[0].shape[1],), len(self.observations), device=embeddings[0].device)
        count = len(self.observations) + len(self._pending)
        self._pending.append(observe(embeddings, loss, self._last_used, self._step, count, self.contrastive, own))

    def _read(self, before: float = math.inf) -> None:
        """Read the pending observations of steps before this one, and look for findings after each."""
        while self._pending and self._pending[0].step < before:
            self.observations.append(self._pending.pop(0).read())
            self._look()

    def _look(self) -> None:
        """Report what the last observations show, each finding once in a run."""
        known = {finding.name for finding in self.findings}
        for finding in _check(self.observations, self.vocabulary) if self.observations else []:
            if finding.name not in known:
                known.add(finding.name)
                self.findings.append(finding)
                logger.warning("step %d: %s (%s); %s", finding.step, finding.name, finding.evidence, finding.fix)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._every = max(1, state.max_steps // OBSERVATIONS)
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and saved:
            self.observations = [Observation(**seen) for seen in saved["observations"]]
            self.findings = [Finding(**finding) for finding in renamed_findings(saved["findings"])]
            self._last_used = None if saved["last_used"] is None else torch.tensor(saved["last_used"], device=args.device)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step = state.global_step
        self._due = state.global_step % self._every == 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look()  # the last log may have added a gradient norm
        self._read(before=self._step)
        if self.stop and self.collapsed:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._read()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        self._read()
        if logs is None or not self.observations:
            return
        if "grad_norm" in logs:
            self.observations[-1] = replace(self.observations[-1], gradient_norm=float(logs["grad_norm"]))
        unlogged = ("step", "gradient_norm")
        seen = {name: value for name, value in asdict(self.observations[-1]).items() if name not in unlogged}
        logs |= {f"monitor/{name}": value for name, value in seen.items() if value is not None}
        logs |= {f"monitor/{finding.name}": 1.0 for finding in self.findings}
