"""Parse the names of ranking measures and compute them with ir-measures."""

import re
import subprocess
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np

from anysplade._common.arguments import nearest, require
from anysplade._common.extras import extra
from anysplade.errors import MeasureError, OptionError
from anysplade.evaluation.runs import Run

with extra("evaluation"):
    import ir_measures

_QUERIES = 1000  # whose rankings are copied at a time
METRICS = ("nDCG@10", "RR@10", "R@100", "R@1000")  # the default


def parse_metrics(names: str | Sequence[str]) -> dict[str, Any]:
    """Objects of ir-measures by their names, in order. Two names, such as RR@10 and MRR@10, may stand for the same measure."""
    names = [names] if isinstance(names, str) else names
    if not names:
        raise OptionError(f"no metric given; for example {' '.join(METRICS)}")
    measures = {}
    for name in names:
        require("metrics", name, str, f"give names, for example {', '.join(METRICS)}")
        measures[name] = _parse(name)
        if measures[name] is None:
            raise MeasureError(f"unknown metric {name!r}: {_suggestion(name)}")
        if not ir_measures.DefaultPipeline.supports(measures[name]):
            raise MeasureError(f"metric {name!r}: no installed library computes it; {_suggestion(name)}")
    return measures


def _parse(name: str) -> Any | None:
    """Parse one name; None if the name or its options are unknown."""
    try:
        found = ir_measures.parse_measure(name.strip())
        found.validate_params()
    except (NameError, ValueError, SyntaxError, TypeError, AttributeError, AssertionError):
        return None
    # ir-measures accepts impossible counts, and some of its providers then end the process.
    counts = [found.params[option] for option in ("cutoff", "rel") if option in found.params]
    return found if all(type(count) is int and 0 < count < 2**31 for count in counts) else None


def _suggestion(name: str) -> str:
    known = {alias.lower(): measure.NAME for alias, measure in ir_measures.measures.registry.items()}
    base, at, cutoff = name.strip().lower().partition("@")
    if not at and base not in known and (joined := re.fullmatch(r"(.*?[^\W\d])[-_ ]*(\d+)", base)):  # ndcg10, recall_100
        base, at, cutoff = joined[1], "@", joined[2]
    near = nearest(base.partition("(")[0], known, cutoff=0.5)
    if near is not None:
        measured = known[near]
        with_cutoff = f"{measured}@{cutoff if cutoff.isdecimal() and int(cutoff) else 10}"
        usual = next((metric for metric in METRICS if metric.partition("@")[0] == measured), measured)  # such as RR@10
        for wanted in (with_cutoff, measured) if at else (usual, with_cutoff):
            if (found := _parse(wanted)) is not None and ir_measures.DefaultPipeline.supports(found):
                return f"did you mean {wanted}?"
    return f"for example {', '.join(METRICS)}"


def measure(
    measures: dict[str, Any], qrels: dict[str, dict[str, int]], run: Run
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Means of measures over all judged queries, and values by query id, both by name. A query without a ranking counts as 0.

    The rankings are changed for the providers of ir-measures. Providers sort by score, break ties by id in different directions,
    and some compare in float32: they get scores that fall by 1 per rank, so the order is that of the run. Some divide by the length
    of a ranking: they get no empty ones. One accepts only numbers as query ids: the queries are numbered.
    """
    values: dict[Any, dict[str, float]] = {measure: dict.fromkeys(qrels, 0.0) for measure in measures.values()}
    numbered = enumerate(qrels, 1)
    try:
        while ids := {str(number): id_ for number, id_ in islice(numbered, _QUERIES)}:
            ranks = {
                number: dict(zip(ranking, map(float, range(len(ranking), 0, -1)), strict=True))
                for number, id_ in ids.items()
                if (ranking := run.get(id_))
            }
            for metric in ir_measures.iter_calc(list(values), {number: qrels[id_] for number, id_ in ids.items()}, ranks):
                values[metric.measure][ids[metric.query_id]] = float(metric.value)
    except subprocess.CalledProcessError as error:
        raise MeasureError(
            f"{', '.join(measures)}: gdeval, which computes ERR and nDCG(dcg='exp-log2'), failed; it takes grades up to 4 and "
            "document ids without white space"
        ) from error
    named = {name: values[measure] for name, measure in measures.items()}
    return {name: float(np.mean(list(by_query.values()))) for name, by_query in named.items()}, named
