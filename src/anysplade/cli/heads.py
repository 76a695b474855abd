"""Commands on a masked LM's head: inspect, rescale."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from anysplade.cli.app import Json, Out, Result, command, is_first_process
from anysplade.model.options import BiasPolicy, Choice, Fold


@command
def inspect(model: str, /, *, data: str | None = None, svg: Path | None = None, json: Json = False) -> Result:
    """Measure a masked LM's head: what its scale will do, and the k and shift it wants.

    Args:
        model: a masked LM's or sparse encoder's folder or hub id.
        data: training pairs to probe with (BEIR folder, JSONL, python-docs); everyday texts otherwise.
        svg: a file for a picture of the logits before and after.
    """
    from anysplade._common import files
    from anysplade.cli import rendering as report
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
        report.head_tables(measured, suggested, data or "built-in texts, before training"),
    )


@command
def rescale(
    model: str,
    /,
    *,
    out: Out,
    k: Choice | None = None,
    shift: Choice = 0.0,
    bias: BiasPolicy = "scale",
    fold: Fold = "none",
    mute: Annotated[bool, Parameter(negative="")] = False,
    data: str | None = None,
    json: Json = False,
) -> Result:
    """Write a stock checkpoint whose MLM logits are logits / k - shift, or whose terms are folded.

    Args:
        model: a masked LM's folder or hub id.
        out: the new checkpoint's folder.
        k: divides the head; "auto" measures what it wants; if left out, 8, and 1 where terms are folded or muted.
        shift: lowers the logits by way of the bias; "auto" likewise.
        bias: whether k divides the decoder's bias too ("scale") or not ("keep").
        fold: makes a cased backbone uncased: a word has one dimension whatever its case and the space before it ("case"), and
            English words of one stem have one too ("stem"). The level and the scale for "auto" are measured after it.
        mute: punctuation and special tokens get no dimension.
        data: training pairs to probe with for "auto"; everyday texts otherwise.
    """
    from anysplade._common import files
    from anysplade.cli import rendering as report
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
    return Result(
        written.to_dict() | {"k": chosen.k, "shift": chosen.shift, "bias_policy": bias, "out": str(out)},
        report.rescaled_lines(written, chosen, out),
    )


def _probe_texts(data: str | None) -> tuple[Sequence[str], Sequence[str]]:
    """Queries and documents to probe with: of the training data, or everyday ones."""
    from anysplade.data.pairs import load_pairs, sample_pairs
    from anysplade.model.probe import PROBE_DOCUMENTS, PROBE_QUERIES

    if data is None:
        return PROBE_QUERIES, PROBE_DOCUMENTS
    return sample_pairs(load_pairs(data, progress=is_first_process()))
