"""Commands that measure effectiveness and cost: evaluate, compare."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from anysplade.cli.app import Json, Result, command, is_first_process
from anysplade.errors import OptionError
from anysplade.model.options import Precision, Runtime


def _split(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The models and the collections among these names, of which the last one is a collection."""
    from anysplade.data.collections import is_collection

    collections = [name for i, name in enumerate(names) if i == len(names) - 1 or is_collection(name)]
    models = [name for name in names if name not in collections]
    if not models:
        raise OptionError(f"{' '.join(names) or 'nothing'}: name at least one model and then a collection")
    return models, collections


@command
def evaluate(
    *names: str,
    metrics: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    split: str = "test",
    seeds: bool = False,
    curve: bool = False,
    runtime: Runtime = "auto",
    precision: Precision = "float32",
    max_length: int | None = None,
    out: Annotated[Path | None, Parameter(name="--out")] = None,
    cache: Path | None = None,
    json: Json = False,
) -> Result:
    """Measure models on collections: effectiveness and cost, and with several models how sure the differences are.

    Args:
        names: models and then collections. A model is a sparse encoder's folder or hub id, a dense model's, a masked LM as it is,
            bm25, bm25-unstemmed, or a TREC run file; a collection is a BEIR folder or zip, a TREC folder, an ir_datasets id, a
            hub dataset, nanobeir or python-docs.
        metrics: names of ir-measures; nDCG@10 RR@10 R@100 R@1000 if none is given.
        split: which qrels.
        seeds: the models are seeds of one: show mean and standard deviation.
        curve: prune documents and queries to their largest weights, and show what that costs and saves.
        runtime: of encoding; auto is openvino where it is installed and can run the model and there are 100 texts or more, which is
            faster and as exact.
        precision: of encoding; bfloat16 and int8 (openvino) are faster and approximate; auto is bfloat16 where the machine has it.
        max_length: tokens a text is cut to, up to the model's positions; what the model was saved with if not given.
        out: a folder for TREC runs, values by query, figures and the JSON.
        cache: a folder for vectors, which are not computed twice; that of ANYSPLADE_CACHE or the user's if not given.
    """
    from anysplade._common import files
    from anysplade._common.files import default_cache
    from anysplade.cli import rendering as report
    from anysplade.evaluation.grid import evaluate_all
    from anysplade.evaluation.measures import METRICS

    measured = metrics or list(METRICS)
    found = evaluate_all(
        *_split(names),
        measured,
        split=split,
        seeds=seeds,
        curves=curve,
        runtime=runtime,
        precision=precision,
        max_length=max_length,
        output=out,
        cache=cache or default_cache(),
        progress=is_first_process(),
    )
    if out is not None and found.curves:
        files.write_atomic(out / "curve.svg", report.curve_figure(found.curves, measured[0]))
    return Result(found.to_dict(), report.evaluations_parts(found, measured))


@command
def compare(
    *runs: str,
    collection: str,
    metrics: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    split: str = "test",
    json: Json = False,
) -> Result:
    """Compare run files on a collection: each against the first, with paired tests and the queries that changed most.

    Args:
        runs: TREC run files, two or more; anything else that evaluate takes as a model will do.
        collection: what the runs were made on.
        metrics: names of ir-measures; nDCG@10 RR@10 R@100 R@1000 if none is given.
        split: which qrels.
    """
    from anysplade._common.files import default_cache
    from anysplade.cli import rendering as report
    from anysplade.evaluation.grid import evaluate_all
    from anysplade.evaluation.measures import METRICS

    if len(runs) < 2:
        raise OptionError(f"{len(runs)} runs: name two or more, the first is what the others are compared with")
    measured = metrics or list(METRICS)
    found = evaluate_all(runs, collection, measured, split=split, cache=default_cache(), progress=is_first_process())
    return Result(found.to_dict(), report.evaluations_parts(found, measured))
