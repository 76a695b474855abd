"""Commands that run many trainings: study, demo."""

import logging
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from anysplade.cli.app import Json, Out, Result, command, is_first_process
from anysplade.cli.config import read_options


@command
def study(
    name: str,
    /,
    *,
    out: Out,
    backbones: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None,
    data: str = "python-docs",
    collections: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None,
    seeds: int = 3,
    k: float = 8.0,
    training: Path | None = None,
    workers: int | None = None,
    plan: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
) -> Result:
    """Run the paper's experiments with their controls and error bars; after an interruption, the same command continues.

    Args:
        name: norm, tradeoff, dynamics, sensitivity, controls or main, or all for these six; or folding.
        out: folder of the cells and of the report.
        backbones: masked LMs, folders or hub ids; the two bundled ones if none is given.
        data: training examples, in any form that train takes.
        collections: what is evaluated, the first one in-domain; python-docs if none is given.
        seeds: trainings of every row.
        k: the paper's; the main study also has its half and its double.
        training: a YAML or TOML file with train's options for all cells; what suits the bundled backbones otherwise.
        workers: cells at a time; one for every GPU, or for every core.
        plan: show what would be trained, what of it is done and, once a training of each backbone is, how long the rest takes;
            nothing is trained.
    """
    from anysplade.cli import rendering as report
    from anysplade.study.pipeline import plan_study, run_study
    from anysplade.study.plan import StudyConfig

    options: dict[str, Any] = {"output": str(out), "data": data, "seeds": seeds, "k": k, "workers": workers}
    if backbones:
        options["backbones"] = tuple(backbones)
    if collections:
        options["collections"] = tuple(collections)
    if training is not None:
        options["training"] = read_options(training, "--training", excluded=("backbone", "data", "output", "k", "shift", "seed"))
    config = StudyConfig(name, **options)
    if plan:
        planned = plan_study(config)
        return Result(planned.to_dict(), report.plan_lines(planned))
    result = run_study(config, progress=is_first_process())
    return Result(result.to_dict(), report.study_lines(result))


@command
def demo(*, out: Out = Path("anysplade-demo"), json: Json = False) -> Result:
    """Run all of it on bundled parts, offline: calibrate, train, evaluate, index, search.

    Args:
        out: the folder for everything it makes; a second run reuses what is there.
    """
    from anysplade.cli import rendering as report
    from anysplade.cli.demo import run_demo

    for told in ("training.run", "data.pairs", "model.encoding"):  # six runs' options, columns and cut texts; warnings stay
        logging.getLogger(f"anysplade.{told}").setLevel(logging.WARNING)
    result = run_demo(out, progress=is_first_process())
    return Result(result.to_dict(), report.demo_parts(result))
