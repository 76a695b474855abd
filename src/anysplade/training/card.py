"""What anysplade adds to the model card that sentence-transformers writes: how the model was made, its results, and its use elsewhere."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard

from anysplade._common.figures import draw
from anysplade.errors import ExtraError
from anysplade.evaluation.costs import COSTS
from anysplade.evaluation.runs import as_name
from anysplade.model.rescaling import formula
from anysplade.training.usage import usage

logger = logging.getLogger(__name__)

_BEFORE = "\n## Training Details\n"  # heading in sentence-transformers' card after the new section
_MADE = "## How it was made"
_ADDED = ("<!-- by anysplade push -->", "<!-- end -->")  # around what ``published_card`` adds
_NAMES = dict(zip(COSTS, ("query active dims", "document active dims", "FLOPS"), strict=True))
_FIGURE = "training.svg"
CARD_FILES = ("README.md", _FIGURE)


def write_card(folder: Path, result: dict[str, Any]) -> None:
    """Add the section and its figure to the card in ``folder``; ``result`` is a ``TrainingResult`` as JSON."""
    path = folder / "README.md"
    card = path.read_text(encoding="utf-8")
    head, found, rest = card.partition(_BEFORE)
    try:
        figure = _curves(result)
    except ExtraError as error:  # training works without matplotlib
        logger.info("the model card has no figure: %s", error)
        figure = None
    card = head + "\n" + _section(result, figure is not None) + found + rest
    if result["dev"] is not None:
        card = _with_results(card, folder.parent.name, [result["dev"] | {"split": result["config"]["dev_split"]}])
    path.write_text(card, encoding="utf-8")
    if figure is not None:
        (folder / _FIGURE).write_text(figure, encoding="utf-8")


def _section(result: dict[str, Any], figure: bool) -> str:
    config, calibration, made = result["config"], result["calibration"], result["provenance"]
    accumulated = f"{config['gradient_accumulation']} × " if config["gradient_accumulation"] > 1 else ""
    steps = f"{result['steps']:,} of {accumulated}{config['batch_size']} queries"
    table = [
        ("Calibration of the MLM head", _calibrated(calibration)),
        ("Query active dims", f"{result['query_active_dims']:.0f} (training texts)"),
        ("Document active dims", f"{result['document_active_dims']:.0f} (training texts)"),
        ("Data", f"`{config['data']}`, {result['pairs']:,} examples, SHA-256 `{result['data_hash'][:16]}`"),
        ("Objective", f"{config['objective']}, {config['regularizer']} regularizer"),
        ("Steps", f"{steps}, seed {config['seed']}, {result['processes']} process(es)"),
    ]
    if config["teacher"] is not None:
        table.insert(-1, ("Teacher", f"`{config['teacher']}`"))
    if result["level_trim"]:
        table.append(("Level trimmed after training", f"{result['level_trim']:+.3g}"))
    lines = [_MADE, "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in table), ""]
    if result["dev"] is not None:
        dev = result["dev"]
        kept = f", of step {result['best_step']:,}" if result["best_step"] else ""
        lines += [
            f"On the dev collection `{dev['collection']}` ({dev['queries']:,} queries, {dev['documents']:,} documents{kept}):",
            "",
            *_results([dev]),
            "",
        ]
    for finding in result["monitoring"]["findings"]:
        lines += [f"Seen at step {finding['step']}: {finding['name']} ({finding['evidence']}).", ""]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    hardware = json.dumps(made["hardware"])
    lines += [
        *([f"![loss and active dims over the steps]({_FIGURE})", ""] if figure else []),
        f"Made with [anysplade](https://pypi.org/project/anysplade) by `{made['command']}`; {versions}; commit {made['commit']}; "
        f"{hardware}.",
        "Any version of sentence-transformers that has `SparseEncoder` loads it; scores are dot products.",
        "",
        "<details><summary>All options, as a file for <code>anysplade train --config</code></summary>",
        "",
        "```yaml",
        yaml.safe_dump(config, sort_keys=False, allow_unicode=True).rstrip(),
        "```",
        "",
        "</details>",
    ]
    return "\n".join(lines) + "\n"


def _calibrated(calibration: Mapping[str, Any]) -> str:
    return f"{formula(calibration['k'], calibration['shift'])} (k = {calibration['k']:g}, shift = {calibration['shift']:g})"


def published_card(card: str, repo_id: str, source: str, evaluations: Sequence[Mapping[str, Any]]) -> str:
    """The card of a model on the hub, with results, if there are any, in text and metadata, and with its use elsewhere.

    Args:
        card: the one in the model's folder; what an earlier call added to it is replaced.
        repo_id: the model's name on the hub.
        source: the model's folder.
        evaluations: each an ``Evaluation`` as JSON.

    Raises:
        ValueError: the card's metadata cannot be read.
    """
    card = re.sub(rf"\n*{_ADDED[0]}.*?{_ADDED[1]}\n*", "\n\n", card, flags=re.DOTALL)
    card = re.sub(r"\bSparseEncoder\(\"sparse_encoder_model_id\"\)", f'SparseEncoder("{repo_id}")', card)
    lines = ["## Results", "", *_results(evaluations), ""] if evaluations else []
    elsewhere, calibration = usage(repo_id, source)
    if calibration and _MADE not in card:
        lines += [f"The MLM head was calibrated: {_calibrated(calibration)}.", ""]
    added = "\n".join([_ADDED[0], *lines, *elsewhere, _ADDED[1]])
    place = next((card.index(heading) for heading in (_MADE, _BEFORE) if heading in card), len(card))
    card = f"{card[:place].rstrip()}\n\n{added}\n\n{card[place:].lstrip()}"
    return _with_results(card, repo_id.rpartition("/")[2], evaluations)


def _with_results(card: str, name: str, evaluations: Sequence[Mapping[str, Any]]) -> str:
    """The card with both columns of each evaluation in its ``model-index``, in place of earlier ones of the same collection."""
    new = [
        EvalResult(
            task_type="sparse-information-retrieval",
            task_name="Sparse Information Retrieval",
            dataset_type=as_name(evaluation["collection"]),
            dataset_name=_label(evaluation),
            dataset_split=evaluation.get("split"),
            dataset_config=_approximate(evaluation),
            metric_type=metric,
            metric_name=_NAMES.get(metric, metric),
            metric_value=evaluation[metric],
        )
        for evaluation in evaluations
        for metric in [*_metrics(evaluation), *COSTS]
    ]
    parsed = ModelCard(card)
    replaced = {result.unique_identifier for result in new}
    results = [result for result in parsed.data.eval_results or [] if result.unique_identifier not in replaced] + new
    if results:
        parsed.data.model_name, parsed.data.eval_results = name, results
    parsed.data.library_name = "sentence-transformers"
    tags = parsed.data.tags or []
    parsed.data.tags = tags + [tag for tag in ("sentence-transformers", "sparse-encoder", "splade") if tag not in tags]
    return str(parsed)


def _results(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table with a row for each evaluation: the collection, effectiveness and cost."""
    metrics = list(dict.fromkeys(metric for evaluation in evaluations for metric in _metrics(evaluation)))
    rows = [["collection", *metrics, *_NAMES.values()], ["---"] * (1 + len(metrics) + len(_NAMES))]
    for evaluation in evaluations:
        values = (f"{evaluation[metric]:.3f}" if metric in evaluation else "–" for metric in metrics)
        rows.append([_label(evaluation).replace("|", r"\|"), *values, *(f"{evaluation[cost]:.2f}" for cost in COSTS)])
    return [f"| {' | '.join(row)} |" for row in rows]


def _metrics(evaluation: Mapping[str, Any]) -> list[str]:
    """The names of the measures; in JSON they lie beside the costs, and nothing else there is a float."""
    return [name for name, value in evaluation.items() if isinstance(value, float) and name not in COSTS]


def _label(evaluation: Mapping[str, Any]) -> str:
    parts = (evaluation["collection"], evaluation.get("split"), _approximate(evaluation))
    return ", ".join(str(part) for part in parts if part)


def _approximate(evaluation: Mapping[str, Any]) -> str | None:
    """The precision of the encoding, if it is an approximation."""
    return None if evaluation["precision"] == "float32" else str(evaluation["precision"])


def _curves(result: dict[str, Any]) -> str:
    logged = [entry for entry in result["log"] if "loss" in entry]
    seen = result["monitoring"]["observations"]

    def paint(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        left.plot([entry["step"] for entry in logged], [entry["loss"] for entry in logged])
        left.set(xlabel="step", ylabel="loss", title="training loss, regularizers included")
        for role, style in (("query", "--"), ("document", "-")):
            right.plot([o["step"] for o in seen], [o[f"{role}_active_dims"] for o in seen], style, label=role)
        right.set(xlabel="step", ylabel="active dims", title="active dims of the batches", yscale="log")
        right.legend(frameon=False)

    return draw(paint, 8, 3)
