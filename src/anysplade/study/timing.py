"""Estimate how long the missing cells of a study take."""

import logging
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

from anysplade._common.logs import at_least
from anysplade.data.collections import Collection
from anysplade.evaluation.evaluations import evaluate
from anysplade.study.cells import METRIC, read_record, trained_length
from anysplade.study.plan import Cell, StudyConfig
from anysplade.training.config import TrainingConfig
from anysplade.training.run import train

_REHEARSAL_STEPS = 4
_REHEARSAL_TEXTS = 100


def known_seconds(config: StudyConfig, out: Path) -> dict[str, float]:
    """Median seconds of the finished cells, by backbone."""
    done: dict[str, list[float]] = {}
    for path in (out / "cells").glob("*.json"):
        record = read_record(path)
        if record and record.options.get("steps") == config.training.get("steps") and config.collections[0] in record.results:
            done.setdefault(record.cell.backbone, []).append(record.seconds)
    return {backbone: statistics.median(seconds) for backbone, seconds in done.items()}


def estimate(missing: Sequence[Cell], config: StudyConfig, out: Path, collections: Mapping[str, Collection]) -> float:
    """Seconds for all missing cells one after the other, from finished cells of the same backbone or from a short rehearsal."""
    seconds = known_seconds(config, out)
    for backbone in {cell.backbone for cell in missing} - seconds.keys():
        seconds[backbone] = _rehearse(backbone, config, out, list(collections.values()))
    return sum(seconds[cell.backbone] for cell in missing)


def _rehearse(backbone: str, config: StudyConfig, out: Path, collections: Sequence[Collection]) -> float:
    """Train for a few steps, evaluate on a few texts, and extrapolate to a whole cell."""
    start = time.perf_counter()
    # What a rehearsal logs is not about the cells.
    quiet = at_least(logging.ERROR, "anysplade.training", "anysplade.model.queries")
    with tempfile.TemporaryDirectory(dir=out) as work, quiet:
        options = {**config.training, "steps": _REHEARSAL_STEPS}
        trained = train(TrainingConfig(backbone, config.data, output=f"{work}/run", **options))
        overhead = time.perf_counter() - start - trained.seconds
        corpus = dict(islice(collections[0].corpus.items(), _REHEARSAL_TEXTS))
        query_id, query = next(iter(collections[0].queries.items()))
        small = Collection("rehearsal", corpus, {query_id: query}, {query_id: {next(iter(corpus)): 1}})
        evaluation = evaluate(trained.model, small, METRIC, depth=10, max_length=trained_length(trained))
    steps = config.training.get("steps") or trained.pairs * config.training.get("epochs", 1.0) / options.get("batch_size", 32)
    texts = sum(len(collection.corpus) + len(collection.queries) for collection in collections)
    encoding = texts * evaluation.seconds["encoding"] / (len(corpus) + 1)
    return overhead + steps * trained.seconds / _REHEARSAL_STEPS + encoding
