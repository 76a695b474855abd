"""Commands that run many trainings: study, demo."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.console import RenderableType
from rich.text import Text

from anysplade._common.progress import counted, duration
from anysplade.cli.app import Result, command, is_first_process
from anysplade.cli.config import read_options
from anysplade.cli.library import options_of
from anysplade.cli.rendering import table

if TYPE_CHECKING:
    from anysplade.study.pipeline import StudyPlan


@command
@options_of("study.plan", "StudyConfig", without=("_", "output"))
def study(
    name: str,
    /,
    *,
    out: Path,
    backbones: list[str] | None = None,
    collections: list[str] | None = None,
    training: Path | None = None,
    plan: Annotated[bool, Parameter(negative="")] = False,
    **options: Any,
) -> Result:
    """Run the paper's experiments with their controls and error bars; after an interruption, the same command continues.

    Args:
        out: folder of the cells and the report.
        backbones: folders or hub ids of masked LMs; the two bundled ones by default.
        collections: collections to evaluate on, the first one in-domain; python-docs by default.
        training: a YAML or TOML file with options of train for all cells; options for the bundled backbones by default.
        plan: train nothing, and show what would be trained, what is done already and, after one training per backbone, how
            long the rest takes.
    """
    from anysplade.study.pipeline import plan_study, run_study
    from anysplade.study.plan import StudyConfig

    options |= {name: tuple(given) for name, given in (("backbones", backbones), ("collections", collections)) if given}
    if training is not None:
        options["training"] = read_options(training, "--training", excluded=("backbone", "data", "output", "k", "shift", "seed"))
    config = StudyConfig(name, output=str(out), **options)
    if plan:
        planned = plan_study(config)
        return Result(planned.to_dict(), plan_lines(planned))
    result = run_study(config, progress=is_first_process())
    parts: list[RenderableType] = []
    for made, found in result.studies.items():
        parts += [Text(made, style="bold"), *(Text(f"- {line}") for line in found.conclusions), ""]
    if result.failed:
        parts.append(f"{counted(len(result.failed), 'cell')} failed; the same command trains again what failed")
    return Result(result.to_dict(), [*parts, f"report: {result.report}"])


def plan_lines(plan: "StudyPlan") -> list[RenderableType]:
    """What a study would train and, if known, how long it takes."""
    rows = [[row.study, row.backbone, row.head, str(row.seeds), str(row.done)] for row in plan.rows]
    left = plan.cells - plan.done
    line = f"{counted(plan.cells, 'training')}, {plan.done:,} of them done; {left:,} to run, {plan.workers} at a time"
    if left and plan.seconds is None:
        line += "; the time is known once one of each backbone is done"
    elif left and plan.seconds is not None:
        line += f", about {duration(plan.seconds)}"
    shared = ["rows of several studies share trainings"] if sum(row.seeds for row in plan.rows) > plan.cells else []
    return [table(("study", "backbone", "head", "seeds", "done"), rows), line, *shared]


@command
def demo(*, out: Path = Path("anysplade-demo")) -> Result:
    """Run all steps on bundled parts, offline: calibrate, train, evaluate, index, search.

    Args:
        out: the folder for all results; a second run reuses them.
    """
    from anysplade.cli.demo import demo_parts, run_demo

    for logged in ("training.run", "training.trainer", "data.pairs", "model.encoding"):  # details of six runs; warnings stay
        logging.getLogger(f"anysplade.{logged}").setLevel(logging.WARNING)
    result = run_demo(out, progress=is_first_process())
    return Result(result.to_dict(), demo_parts(result))
