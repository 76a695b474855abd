"""Shared parts of the experiments that train models: their options, examples, cells and table rows."""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from anysplade import evaluate, load_pairs
from anysplade._common.files import write_atomic
from anysplade._common.provenance import provenance
from anysplade.evaluation.costs import COSTS
from anysplade.study.cells import METRIC, METRICS, CellRecord, QueryScores
from anysplade.study.plan import Cell
from anysplade.study.run import run_cells

Key = TypeVar("Key", bound=Hashable)
FIELDS = dict(zip(METRICS, ("ndcg", "rr", "recall"), strict=True)) | {name: name for name in COSTS}  # of ``QueryScores``
NEVER = 10**6  # steps between checkpoints that no training here reaches


def parser(description: str | None) -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--workers", type=int, default=2, help="trainings at the same time")
    arguments.add_argument("--json", type=Path, help="write the result here")
    return arguments


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Write a result with its provenance if a path is given."""
    if path:
        write_atomic(path, json.dumps(result | {"provenance": provenance()}, indent=1) + "\n")


def sample_examples(sources: Iterable[Path], path: Path, count: int | None = None) -> str:
    """Write a random sample of the sources' pairs, or all pairs in random order, into one file; returns its path."""
    if not path.exists():
        pairs = [pair for source in sources for pair in load_pairs(source)]
        sample = random.Random(0).sample(pairs, count or len(pairs))
        write_atomic(path, "".join(json.dumps({"query": p.query, "positive": p.positive}) + "\n" for p in sample))
    return str(path)


def run_all(cells: Sequence[Cell], collections: Sequence[str], out: Path, workers: int) -> dict[str, CellRecord]:
    """Run cells and return their records by hash; ends the process if one fails."""
    records, failed = run_cells(cells, collections, out, workers, progress=True)
    if failed:
        sys.exit(f"{len(failed)} cells failed, the first one: {next(iter(failed.values()))}")
    return records


def with_seeds(cell: Cell, count: int) -> list[Cell]:
    return [replace(cell, options={**cell.options, "seed": seed}) for seed in range(count)]


def run_groups(
    groups: Mapping[Key, Cell], seeds: int, collections: Sequence[str], out: Path, workers: int
) -> dict[Key, list[CellRecord]]:
    """Run each cell with several seeds; returns its records by seed."""
    cells = {key: with_seeds(cell, seeds) for key, cell in groups.items()}
    records = run_all([cell for group in cells.values() for cell in group], collections, out, workers)
    return {key: [records[cell.hash] for cell in group] for key, group in cells.items()}


def over_seeds(results: Sequence[Mapping[str, float]], metric: str = METRIC) -> dict[str, Any]:
    """Mean of each column over seeds; of one metric also the standard deviation, None for one seed, and the values."""
    values = [result[metric] for result in results]
    means = {name: statistics.mean(result[name] for result in results) for name in results[0]}
    return means | {f"{metric} sd": statistics.stdev(values) if len(values) > 1 else None, f"{metric} by seed": values}


def named(scores: QueryScores) -> dict[str, float]:
    return {name: getattr(scores, field) for name, field in FIELDS.items()}


def cells_row(label: dict[str, Any], records: Sequence[CellRecord]) -> dict[str, Any]:
    """A row of a table: cells that differ in the seed, on each collection."""
    scores = {path: [named(record.results[path]) for record in records] for path in records[0].results}
    findings = [finding["name"] for record in records for finding in record.findings]
    return table_row(label, {"k": records[0].k, "shift": records[0].shift}, findings, scores)


def table_row(
    label: dict[str, Any], start: dict[str, float], findings: Iterable[str], scores: Mapping[str, Sequence[Mapping[str, float]]]
) -> dict[str, Any]:
    """A row of a table: trainings that differ in the seed, with the ``scores`` by collection and seed."""
    results = {Path(collection).name: over_seeds(of_seeds) for collection, of_seeds in scores.items()}
    return label | {"start": start, "findings": sorted(set(findings)), "results": results}


def untrained_row(model: str, data: Path, collections: Sequence[str], metrics: Sequence[str], **options: Any) -> dict[str, Any]:
    """A row of a table: a model as it is, on collections in a folder."""
    results = {name: evaluate(model, data / name, metrics, depth=100, **options).metrics for name in collections}
    return {"model": Path(model).name, "results": results}
