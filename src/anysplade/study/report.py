"""Write the results of the studies as an HTML file, a Markdown file and SVG figures. Nothing is computed here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from jinja2 import Environment, PackageLoader, select_autoescape

from anysplade._common.figures import INK
from anysplade._common.files import write_atomic
from anysplade._common.progress import counted, duration
from anysplade.study.cells import METRIC, METRICS
from anysplade.study.figures import Figure, study_figures
from anysplade.study.results import RowResult, Settings, Study, StudyResult, plus_minus


@dataclass(frozen=True)
class _Table:
    title: str
    names: list[str]  # of the columns
    texts: int  # number of columns, from the left, that contain text
    rows: list[tuple[list[str], str | None]]  # values, and the id of the entry to which they link


def write_report(result: StudyResult, out: Path) -> None:
    """Write ``report.html``, ``report.md`` and ``figures/*.svg`` into a folder."""
    parts = [_part(name, result) for name in result.studies]
    content = {"studies": parts, "entries": _entries(result), "cells": result.cells, "metric": METRIC}
    environment = Environment(loader=PackageLoader("anysplade.study"), autoescape=select_autoescape(["html"]), trim_blocks=False)
    environment.filters |= {"short": _short, "duration": duration, "inline": _inline}
    for template, name in (("study.html", "report.html"), ("study.md", "report.md")):
        write_atomic(out / name, environment.get_template(template).render(content) + "\n")
    for figure in (figure for part in parts for figure in part["figures"]):
        write_atomic(out / "figures" / f"{figure.name}.svg", figure.svg.replace(INK, "#555555"))


def _part(name: str, result: StudyResult) -> dict[str, Any]:
    study = result.studies[name]
    return {
        "name": name,
        "settings": _settings(study.settings),
        "figures": study_figures(name, result),
        "conclusions": study.conclusions,
        "tables": _tables(study, result, folding=name == "folding"),
        "origin": _origin(study.provenance),
    }


def _short(name: str) -> str:
    """The last part of a path or hub id."""
    return Path(name).name


def _settings(settings: Settings) -> str:
    names, collections = (", ".join(map(_short, paths)) for paths in (settings.backbones, settings.collections))
    options = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.training.items())
    return f"{names}; trained on {_short(settings.data)}, evaluated on {collections}; {counted(settings.seeds, 'seed')}. {options}."


def _origin(provenance: dict[str, Any]) -> str:
    hardware = provenance["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    machine = f"{hardware['machine']}, {hardware['cpus']} cores, {', '.join(hardware['gpus']) or 'no GPU'}"
    return f"{provenance['command']} (commit {(provenance['commit'] or 'unknown')[:12]}; {machine}; {versions})"


# ----------------------------------------------------------------------------------------- tables

_MEASURES = [f"{metric} ± sd" for metric in METRICS]
_COSTS = ["query active dims", "document active dims", "FLOPS"]
_COLUMNS = ["backbone", "head", "seeds", "k", "shift", *_MEASURES, *_COSTS, "monitor"]
_DIFFERENCE = f"difference in {METRIC} ± half of its 95 % interval"
_TEST_COLUMNS = ["backbone", "collection", "head", "against", _DIFFERENCE, "p, Holm", "counts", "FLOPS", "FLOPS of the other"]


def _tables(study: Study, result: StudyResult, folding: bool) -> list[_Table]:
    collections = study.settings.collections
    if study.tests is None:
        return [_Table(_short(collections[0]), _COLUMNS, 2, [_line(row, collections[0]) for row in study.rows])]
    tables = []
    for collection in collections:
        lines: list[tuple[list[str], str | None]] = [_line(row, collection) for row in study.rows]
        for label, baselines in (("BM25", result.bm25), ("BM25 without stemming", result.unstemmed if folding else {})):
            if (found := baselines.get(collection)) is not None:
                measures = [f"{value:.3f}" for value in (found.ndcg, found.rr, found.recall)]
                lines.append(([label, *[""] * 4, *measures, *["–"] * 4], None))
        tables.append(_Table(_short(collection), _COLUMNS, 2, lines))
    tests = [
        [test.backbone, _short(test.collection), test.head, test.against, plus_minus(test.difference, test.noise, "+"),
         f"{test.p_corrected:.2g}", "yes" if test.counts else "no", f"{test.flops:.2f}", f"{test.flops_of_other:.2f}"]
        for test in study.tests
    ]  # fmt: skip
    return [*tables, _Table("Tests", _TEST_COLUMNS, 4, [(values, None) for values in tests])]


def _line(row: RowResult, collection: str) -> tuple[list[str], str]:
    means = row.results[collection]
    values = [
        row.backbone, row.label, str(row.runs), f"{row.k:.3g}", f"{row.shift:.3g}",
        means.text, plus_minus(means.rr, means.rr_sd), plus_minus(means.recall, means.recall_sd),
        f"{means.query_active_dims:,.0f}", f"{means.document_active_dims:,.0f}", f"{means.flops:.2f}",
        ", ".join(row.findings) or "–",
    ]  # fmt: skip
    return values, _entry_id(row)


def _entry_id(row: RowResult) -> str:
    return f"row-{row.cells[0]}-{row.runs}"


def _entries(result: StudyResult) -> dict[str, RowResult]:
    """The rows of all studies by id; of rows that studies share, the first one."""
    entries: dict[str, RowResult] = {}
    for study in result.studies.values():
        for row in study.rows:
            entries.setdefault(_entry_id(row), row)
    return entries


def _inline(figure: Figure) -> str:
    """Turn an SVG file of matplotlib into a part of an HTML page: unique ids, no namespaces, the colour of the page's text."""
    root = ElementTree.fromstring(figure.svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {name.rpartition("}")[2]: value.replace(INK, "currentColor") for name, value in element.items()}
        for name in attributes.keys() & {"id", "href", "clip-path"}:  # values: "name", "#name" and "url(#name)"
            before, mark, target = attributes[name].rpartition("#")
            attributes[name] = f"{before}{mark}{figure.name}-{target}"
        element.attrib = attributes
    root.attrib = {"role": "img", "aria-label": figure.caption, "stroke-linejoin": "round", "viewBox": root.attrib["viewBox"]}
    return ElementTree.tostring(root, encoding="unicode")
