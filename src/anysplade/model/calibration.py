"""Choose k and shift for a head from texts alone, without labels."""

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anysplade._common.figures import draw
from anysplade._common.tables import Tabular
from anysplade.errors import ModelError
from anysplade.model.head import require_masked_lm
from anysplade.model.measuring import Probe, ProbeReport, measure_logits, summarize_probe
from anysplade.model.options import BiasPolicy, Choice
from anysplade.model.probe import PROBE_DOCUMENTS, PROBE_QUERIES
from anysplade.model.rescaling import check_rescaling, formula

logger = logging.getLogger(__name__)

# docs/calibration.md explains the rule and the evidence for it.
ACTIVE_SHARE = 0.001  # share of the token logits that is above zero at the start: the level
MEAN_EXCESS = 2.0  # mean of these logits: the scale
MEAN_EXCESS_SCALE_ONLY = 0.4  # the scale if the level may not change: more terms are active, so each must weigh less
FEWEST_TERMS = 4  # active in the median text at least: 0.1 % of a small vocabulary is less than one term
_RESOLUTION = 1e-3  # of k, and of shift relative to the mean excess: probe texts cannot tell smaller differences
_RETRIEVES = 0.9  # times the loss of guessing: only a trained SPLADE starts below it; raw and calibrated heads start above guessing
# Signs of failure in the runs behind docs/calibration.md: documents are alike, or the softmax is sure of the wrong one.
_ALIKE = 0.65  # cosine between documents
_SATURATED = 10.0  # times the loss of guessing
_EMPTY = 0.5  # active dims of a text: fewer are none

Verdict = Literal["collapses", "degrades", "trains"]


@dataclass(frozen=True, repr=False)
class Calibration(Tabular):
    """The affine map ``logits / k - shift`` for a head, and its effect on probe texts. Dividing by k is arXiv 2606.18811."""

    k: float  # divides the logits
    shift: float  # subtracted from the divided logits
    bias: BiasPolicy  # whether k divides the decoder's bias too
    before: ProbeReport | None  # the raw head on the probe texts; None without probe texts
    after: ProbeReport | None  # the calibrated head on the probe texts; None without probe texts
    declined: tuple[float, float] | None = None  # k and shift that were not applied because the head is sparse already

    @property
    def formula(self) -> str:
        return formula(self.k, self.shift)

    @property
    def is_unchanged(self) -> bool:
        """Whether the head stays as it is."""
        return (self.k, self.shift) == (1, 0)

    @property
    def sides(self) -> dict[str, ProbeReport]:
        """Reports by the name of the head: raw and calibrated, or as it is; empty without probe texts."""
        if self.before is None or self.after is None:
            return {}
        if self.is_unchanged:
            return {"as it is": self.before}
        return {"raw": self.before, f"k={self.k:g}, shift={self.shift:g}": self.after}

    @property
    def explanation(self) -> str | None:
        """Why the head stays as it is, and how to change it nevertheless; None if it was calibrated."""
        if self.declined is None or self.before is None:
            return None
        return (
            f"already sparse: use it as it is ({self.before.positive_share:.2%} of token logits above zero, "
            f"{self.before.document_active_dims:,.0f} active dims per document); only numbers for k and shift change it"
        )

    @property
    def verdicts(self) -> tuple[Verdict, Verdict] | None:
        """Predicted outcome of SPLADE training for the raw and the calibrated head; None without probe texts."""
        return None if self.before is None or self.after is None else (_foresee(self.before), _foresee(self.after))

    def _rows(self) -> list[dict[str, Any]]:
        """One row for each of ``sides``, or a row of k and shift."""
        return [{"head": name} | probe._rows()[0] for name, probe in self.sides.items()] or [{"k": self.k, "shift": self.shift}]


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    queries: Sequence[str] = PROBE_QUERIES,
    documents: Sequence[str] = PROBE_DOCUMENTS,
    *,
    k: Choice = "auto",
    shift: Choice = "auto",
    bias: BiasPolicy = "scale",
    strength: int = 0,
) -> Calibration:
    """Choose k and shift for a masked LM from probe texts. The model is not changed.

    The result is deterministic and equivariant: logits ten times larger get a k ten times larger and the same shift.

    Args:
        tokenizer: of the model.
        queries: probe texts; everyday ones by default.
        documents: probe texts; document i answers query i.
        k: a number, or "auto".
        shift: a number, or "auto".
        bias: whether k divides the decoder's bias too ("scale") or not ("keep").
        strength: number of collapsed trainings before; each leaves a third as many token logits above zero.

    Raises:
        ModelError: the logits are all equal or not finite.
        OptionError: an impossible k or shift.
    """
    require_masked_lm(model)
    if k == "auto" or shift == "auto":
        chosen = choose(measure_logits(model, tokenizer, queries, documents), k, shift, bias, strength)
        if chosen.explanation:
            logger.info("%s", chosen.explanation)
        return chosen
    check_rescaling(k, shift, bias)
    return Calibration(float(k), float(shift), bias, None, None)


def choose(
    probe: Probe,
    k: Choice = "auto",
    shift: Choice = "auto",
    bias: BiasPolicy = "scale",
    strength: int = 0,
    trained: bool = False,
) -> Calibration:
    """Choose the calibration of a measured head.

    The scale of a head is the mean excess of its highest 0.1 % of token logits over the lowest of them. ``k`` brings the scale to a
    fixed value, in four digits; ``shift`` then lowers the logits until only those 0.1 % are above zero, or more of them for a small
    vocabulary.

    A head that is sparse already (``is_sparse``, or ``trained`` says so) would lose what it learned, so "auto" does not change it.
    Raises the errors of ``calibrate``.
    """
    wanted = _choose(probe, k, shift, bias, strength)
    if "auto" not in (k, shift) or strength or not (trained or is_sparse(wanted)):
        return wanted
    k, shift = (1.0 if k == "auto" else float(k)), (0.0 if shift == "auto" else float(shift))
    return Calibration(k, shift, bias, wanted.before, summarize_probe(probe.affine(k, shift, bias)), (wanted.k, wanted.shift))


def _choose(probe: Probe, k: Choice, shift: Choice, bias: BiasPolicy, strength: int) -> Calibration:
    if shift == "auto" and probe.bias is None:
        logger.warning("this head has no bias, so its level stays as it is; k alone is chosen")
        shift = 0.0
    share = _share(probe, strength)
    excess = mean_excess(probe.token_logits, share)
    chooses_k = k == "auto"
    if k == "auto":
        if not (np.isfinite(excess) and excess > 0):
            raise ModelError("the head's logits are all equal or not finite on the probe texts; was the checkpoint saved whole?")
        scale = MEAN_EXCESS if shift == "auto" else MEAN_EXCESS_SCALE_ONLY
        k = float(f"{excess / scale:.4g}")
    check_rescaling(k, 0.0 if shift == "auto" else shift, bias)
    if shift == "auto":
        digits = 3 - math.floor(math.log10(excess / k)) if excess > 0 else 3
        level = float(np.quantile(probe.affine(k, 0.0, bias).token_logits, 1 - share))
        shift = float(np.round(level, digits))
        if chooses_k and abs(k - 1) <= _RESOLUTION and abs(shift) <= _RESOLUTION * excess:
            k, shift = 1.0, 0.0  # calibrated already; untying the head would only make its checkpoint larger
    return Calibration(float(k), float(shift), bias, summarize_probe(probe), summarize_probe(probe.affine(k, shift, bias)))


def _share(probe: Probe, strength: int) -> float:
    """The share of the token logits that should be above zero."""
    share = ACTIVE_SHARE / 3**strength
    fewest = max(1, round(FEWEST_TERMS / 3**strength))
    for pooled in (probe.query_logits, probe.document_logits):  # (texts, vocabulary)
        if fewest < pooled.shape[1]:
            lowest = np.median(np.partition(pooled, -fewest, axis=1)[:, -fewest])
            share = max(share, float((probe.token_logits >= lowest).mean()))
    return share


def is_sparse(calibration: Calibration) -> bool:
    """Whether a head is that of a trained SPLADE: few token logits are above zero, and queries find their documents.

    Few are at most as many as ``auto`` would leave. Needs probe texts in which document i answers query i.
    """
    before, after = calibration.before, calibration.after
    if before is None or after is None or before.start_loss is None:
        return False
    few = before.positive_share <= after.positive_share and before.document_active_dims >= _EMPTY
    return few and before.start_loss < _RETRIEVES * before.chance


def mean_excess(logits: np.ndarray, share: float) -> float:
    """Mean of the highest ``share`` of the logits minus the lowest of them; 0 if they are all equal."""
    level = np.quantile(logits, 1 - share)
    above = logits[logits > level]
    return float(above.mean(dtype=np.float64) - level) if above.size else 0.0


def _foresee(start: ProbeReport) -> Verdict:
    """Predict the outcome of SPLADE training from the start of a head."""
    if min(start.query_active_dims, start.document_active_dims) < _EMPTY:  # no gradient
        return "collapses"
    alike = start.document_similarity > _ALIKE
    saturated = start.start_loss is not None and start.start_loss > _SATURATED * start.chance
    return "collapses" if alike and saturated else "degrades" if alike or saturated else "trains"


def logit_figure(calibration: Calibration) -> str:
    """Histograms of the token logits before and after calibration as SVG; needs probe texts."""
    sides = calibration.sides

    def paint(figure: Any) -> None:
        rows = figure.subplots(len(sides), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, (title, side) in zip(rows, sides.items(), strict=True):
            edges, shares = side.histogram["edges"], side.histogram["shares"]
            colors = ["#c2410c" if edge >= 0 else "#94a3b8" for edge in edges[:-1]]
            axes.bar(edges[:-1], shares, [b - a for a, b in itertools.pairwise(edges)], align="edge", color=colors)
            axes.axvline(0, color="black", linewidth=1)
            axes.set_yscale("log")
            axes.set_title(
                f"{title}: {side.positive_share:.2%} of token logits above zero, "
                f"{side.document_active_dims:,.0f} active dims per document",
                fontsize=9,
                loc="left",
            )
            axes.set_ylabel("share")
        rows[-1].set_xlabel("logit; SPLADE keeps those right of the line")

    return draw(paint, 7, 2.2 * len(sides))
