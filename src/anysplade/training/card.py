"""A section about the training for the model card that sentence-transformers writes."""

import json
import logging
from pathlib import Path
from typing import Any

import yaml

from anysplade._common.figures import draw
from anysplade.errors import ExtraError
from anysplade.model.rescaling import formula

logger = logging.getLogger(__name__)

_BEFORE = "\n## Training Details\n"  # heading in sentence-transformers' card after the new section
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
    path.write_text(head + "\n" + _section(result, figure is not None) + found + rest, encoding="utf-8")
    if figure is not None:
        (folder / _FIGURE).write_text(figure, encoding="utf-8")


def _section(result: dict[str, Any], figure: bool) -> str:
    config, calibration, made = result["config"], result["calibration"], result["provenance"]
    accumulated = f"{config['gradient_accumulation']} × " if config["gradient_accumulation"] > 1 else ""
    steps = f"{result['steps']:,} of {accumulated}{config['batch_size']} queries"
    table = [
        ("Calibration of the MLM head", formula(calibration["k"], calibration["shift"])),
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
    lines = ["## How it was made", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in table), ""]
    if result["dev"] is not None:
        dev = result["dev"]
        kept = f", of step {result['best_step']:,}" if result["best_step"] else ""
        lines += [
            f"On the dev collection `{dev['collection']}` ({dev['queries']:,} queries, {dev['documents']:,} documents{kept}):",
            "",
            "| nDCG@10 | RR@10 | query active dims | document active dims | FLOPS |",
            "|---|---|---|---|---|",
            f"| {dev['nDCG@10']:.3f} | {dev['RR@10']:.3f} | {dev['query_active_dims']:.1f} | {dev['document_active_dims']:.1f} "
            f"| {dev['flops']:.2f} |",
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
