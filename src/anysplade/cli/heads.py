"""Commands on a masked LM's head: inspect, rescale."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import RenderableType
from rich.text import Text

from anysplade.cli.app import Result, command, is_first_process
from anysplade.cli.rendering import table
from anysplade.model.options import BiasPolicy, Choice, Fold

if TYPE_CHECKING:
    from anysplade.model.calibration import Calibration
    from anysplade.model.measuring import HeadReport


@command
def inspect(model: str, /, *, data: str | None = None, svg: Path | None = None) -> Result:
    """Measure a masked LM's head: what its scale will do to training, and the k and shift that it needs.

    Args:
        model: folder or hub id of a masked LM or sparse encoder.
        data: training pairs to measure with (BEIR folder, JSONL, python-docs); everyday texts by default.
        svg: a file for a figure of the logits before and after calibration.
    """
    from anysplade._common import files
    from anysplade.model import calibration, encoder, measuring

    loaded, tokenizer, trained = encoder.open_masked_lm(model)
    queries, documents = _probe_texts(data)
    probe = measuring.measure_logits(loaded, tokenizer, queries, documents)
    measured = measuring.describe_head(loaded, probe, model)
    suggested = calibration.choose(probe, trained=trained)
    verdict = dict(zip(("raw", "calibrated"), suggested.verdicts or (None, None), strict=True))
    if svg is not None:
        files.write_atomic(svg, calibration.logit_figure(suggested))
    return Result(
        measured.to_dict() | {"suggested": suggested.to_dict(), "verdict": verdict},
        _head_parts(measured, suggested, data or "built-in texts, before training"),
    )


@command
def rescale(
    model: str,
    /,
    *,
    out: Path,
    k: Choice | None = None,
    shift: Choice = 0.0,
    bias: BiasPolicy = "scale",
    fold: Fold = "none",
    mute: Annotated[bool, Parameter(negative="")] = False,
    data: str | None = None,
) -> Result:
    """Write a stock checkpoint whose MLM logits are logits / k - shift, or whose terms are folded.

    Args:
        model: folder or hub id of a masked LM.
        out: folder of the new checkpoint.
        k: divides the head; "auto" measures it; 8 by default, and 1 if terms are folded or muted.
        shift: lowers the logits through the bias; "auto" measures it.
        bias: whether k divides the decoder's bias too ("scale") or not ("keep").
        fold: makes a cased backbone uncased: a word has one dimension whatever its case and the space before it ("case"), and
            English words with the same stem share one too ("stem"). "auto" measures k and shift after it.
        mute: give punctuation and special tokens no dimension.
        data: training pairs to measure with for "auto"; everyday texts by default.
    """
    from anysplade._common import files
    from anysplade.model import calibration, checkpoints, folding, measuring, rescaling

    if k is None:
        k = 8.0 if fold == "none" and not mute else 1.0
    files.require_empty(out)
    loaded, tokenizer = checkpoints.load_masked_lm(model, dtype="auto")
    tokenizer = folding.fold_head(loaded, tokenizer, fold, mute)
    texts = _probe_texts(data) if "auto" in (k, shift) else ((), ())
    chosen = calibration.calibrate(loaded, tokenizer, *texts, k=k, shift=shift, bias=bias)
    rescaling.rescale_head(loaded, chosen.k, chosen.shift, bias)
    with files.atomic_folder(out) as folder:
        loaded.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    written = measuring.describe_head(loaded, None, str(out))
    found = written.to_dict() | {"k": chosen.k, "shift": chosen.shift, "bias_policy": bias, "out": str(out)}
    lines: list[RenderableType] = [_folded(written)] if written.folding else []
    lines += [
        f"the head of {written.architecture} stays as it is"
        if chosen.is_unchanged
        else f"{chosen.formula} (bias: {chosen.bias}), in the head of {written.architecture}",
        "decoder tied, the size unchanged" if written.tied else "decoder not tied",
        f"written to {out}; load it with AutoModelForMaskedLM.from_pretrained({str(out)!r})",
    ]
    return Result(found, lines)


def _probe_texts(data: str | None) -> tuple[Sequence[str], Sequence[str]]:
    """Queries and documents to measure with: from training data, or everyday texts."""
    from anysplade.data.pairs import read_sample
    from anysplade.model.probe import PROBE_DOCUMENTS, PROBE_QUERIES

    if data is None:
        return PROBE_QUERIES, PROBE_DOCUMENTS
    return read_sample(data, progress=is_first_process())


def _head_parts(report: "HeadReport", suggested: "Calibration", texts: str) -> list[RenderableType]:
    """The head, what it does to the probe texts, and the verdict; ``texts`` describes the probe texts."""
    tied = "tied to the input embeddings" if report.tied else "not tied"
    about = (
        f"{report.architecture}: vocabulary {report.vocabulary:,}, width {report.width}, decoder {tied}, "
        f"{'with' if report.bias else 'without'} bias\n"
        f"decoder norm {report.frobenius_norm:.1f}; row norm {report.mean_row_norm:.3f}, at most {report.max_row_norm:.3f}"
    )
    if report.rescaled:
        about += f"\nrescaled before: k={report.rescaled['k']:g}, shift={report.rescaled['shift']:g}"
    if report.folding:
        about += f"\n{_folded(report)}"
    sides = suggested.sides
    first = next(iter(sides.values()))
    rows: list[list[str]] = []
    for label, name, form in (
        ("token logits above zero", "positive_share", ".2%"),
        ("query active dims", "query_active_dims", ",.0f"),
        ("document active dims", "document_active_dims", ",.0f"),
        ("FLOPS", "flops", ",.1f"),
        ("score, mean", "score_mean", ",.1f"),
        ("score, standard deviation", "score_std", ",.1f"),
        ("cosine between documents", "document_similarity", ".2f"),
        (f"loss (guessing: {first.chance:.2f})", "start_loss", ",.2f"),
    ):
        values = [getattr(side, name) for side in sides.values()]
        rows.append([label, *("–" if value is None else format(value, form) for value in values)])
    for percentile in first.logit_percentiles:
        values = [round(side.logit_percentiles[percentile], 2) + 0 for side in sides.values()]  # + 0 turns -0.0 into 0.0
        rows.append([f"logits, percentile {percentile}", *(f"{value:.2f}" for value in values)])
    raw, calibrated = suggested.verdicts or ("", "")
    if suggested.explanation:
        verdict = suggested.explanation
    elif len(sides) == 1:
        verdict = f"calibrated already, so nothing changes: SPLADE training from it {calibrated}"
    else:
        verdict = f"SPLADE training from the raw head {raw}; from k={suggested.k:g}, shift={suggested.shift:g} it {calibrated}"
    return [about, table((f"on {texts}", *sides), rows), Text(verdict, style="bold")]


def _folded(report: "HeadReport") -> str:
    """What folding did to the terms."""
    assert report.folding is not None
    done = report.folding
    folded = [] if done["by"] == "none" else [f"{done['folded']:,} terms folded into others by {done['by']}"]
    muted = [f"{done['muted']:,} terms of punctuation and special tokens muted"] if done["mute"] else []
    return f"{', '.join(folded + muted)}: {done['live']:,} of {report.vocabulary:,} are left"
