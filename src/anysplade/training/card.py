"""What anysplade adds to the model card of sentence-transformers: how the model was made, its results, and its use elsewhere."""

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
from anysplade.evaluation.costs import COSTS, OWN_WORDS
from anysplade.evaluation.runs import as_name
from anysplade.model.head import RECORD
from anysplade.model.rescaling import formula
from anysplade.training.usage import masked_lm_config, usage

logger = logging.getLogger(__name__)

_BEFORE = "\n## Training Details\n"  # heading in sentence-transformers' card after the new section
_MADE = "## How it was made"
_ADDED = "<!-- anysplade push -->"  # before and after what ``published_card`` adds
_TAGS = ("sentence-transformers", "sparse-encoder", "splade")
_COSTS = dict(zip(COSTS, ("query active dims", "document active dims", "FLOPS"), strict=True))
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
        ("Own words kept, by idf", _own_words(result)),
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
        kept = f"; they chose step {result['best_step']:,}, so other queries may give less" if result["best_step"] else ""
        lines += [
            f"On the dev collection `{dev['collection']}` ({dev['queries']:,} queries, {dev['documents']:,} documents{kept}):",
            "",
            *_table([dev]),
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


def _own_words(result: Mapping[str, Any]) -> str:
    """What the finished model's vectors keep of the training texts' words; queries that are their tokens lose none."""
    found = ((plural, result[f"{role}_own_words"]) for role, plural in (("query", "queries"), ("document", "documents")))
    return ", ".join(f"{share:.2f} of {plural}" for plural, share in found if share is not None) + " (training texts)"


def _calibrated(calibration: Mapping[str, Any]) -> str:
    return f"{formula(calibration['k'], calibration['shift'])} (k = {calibration['k']:g}, shift = {calibration['shift']:g})"


def published_card(card: str, repo_id: str, source: str, evaluations: Sequence[Mapping[str, Any]]) -> str:
    """The card of a model on the hub: with results in text and metadata, if there are any, and with its use elsewhere.

    ``card`` is the one in the folder ``source``; what an earlier call added to it is replaced. ``evaluations`` are JSON.
    """
    card = re.sub(f"\n*{_ADDED}.*?{_ADDED}\n*", "\n\n", card, flags=re.DOTALL)
    card = card.replace('SparseEncoder("sparse_encoder_model_id")', f'SparseEncoder("{repo_id}")')
    config = masked_lm_config(source)
    lines = ["## Results", "", *_table(evaluations), ""] if evaluations else []
    if _MADE not in card and "k" in (record := config.get(RECORD) or {}):
        lines += [f"The MLM head was calibrated: {_calibrated(record)}.", ""]
    added = "\n".join([_ADDED, *lines, usage(repo_id, source, config), "", _ADDED])
    place = next((card.index(heading) for heading in (_MADE, _BEFORE) if heading in card), len(card))
    card = f"{card[:place].rstrip()}\n\n{added}\n\n{card[place:].lstrip()}"
    return _with_results(card, repo_id.rpartition("/")[2], evaluations)


def _with_results(card: str, name: str, evaluations: Sequence[Mapping[str, Any]]) -> str:
    """The card with effectiveness and cost of each evaluation in its ``model-index``; those of an earlier push are replaced."""
    parsed = ModelCard(card)
    data: Any = parsed.data
    ours = (result for result in data.eval_results or [] if result.dataset_split or "sha256" not in (result.dataset_args or {}))
    results = list(ours) + [
        EvalResult(
            task_type="sparse-information-retrieval",
            task_name="Sparse Information Retrieval",
            dataset_type=as_name(evaluation["collection"]),
            dataset_name=_label(evaluation),
            dataset_split=evaluation.get("split"),
            dataset_args={"sha256": evaluation["data_hash"], "precision": evaluation["precision"]},
            metric_type=metric,
            metric_name=_COSTS.get(metric, metric),
            metric_value=evaluation[metric],
        )
        for evaluation in evaluations
        for metric in [*_metrics(evaluation), *_COSTS]
    ]
    if results:
        data.model_name, data.eval_results = name, results
    data.library_name, data.tags = "sentence-transformers", list(dict.fromkeys([*(data.tags or []), *_TAGS]))
    return str(parsed)


def _table(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row for each evaluation: the collection, effectiveness and cost."""
    metrics = list(dict.fromkeys(metric for evaluation in evaluations for metric in _metrics(evaluation)))
    rows = [["collection", *metrics, *_COSTS.values()], ["---"] * (1 + len(metrics) + len(_COSTS))]
    for evaluation in evaluations:
        values = (f"{evaluation[metric]:.3f}" if metric in evaluation else "–" for metric in metrics)
        rows.append([_label(evaluation).replace("|", r"\|"), *values, *(f"{evaluation[cost]:.2f}" for cost in _COSTS)])
    return [f"| {' | '.join(row)} |" for row in rows]


def _metrics(evaluation: Mapping[str, Any]) -> list[str]:
    """The names of the measures; in JSON they lie beside the costs, and nothing else there is a float."""
    return [name for name, value in evaluation.items() if isinstance(value, float) and name not in (*COSTS, *OWN_WORDS)]


def _label(evaluation: Mapping[str, Any]) -> str:
    """The collection, with its split if that is known, and the precision if that is approximate."""
    parts = (evaluation["collection"], evaluation.get("split"), evaluation["precision"].replace("float32", ""))
    return ", ".join(filter(None, parts))


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
