"""The experiments of "Rescaling MLM-Head for Neural Sparse Retrieval" (arXiv 2606.18811), with the controls it lacks.

A study is a list of rows: a backbone, an edit of its head, the training's options. A row has a cell for each seed
(``anysplade.study.cells``). Studies share cells.
"""

from collections.abc import Collection, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from anysplade._common.arguments import did_you_mean
from anysplade.errors import OptionError
from anysplade.model.backbones import BUNDLED
from anysplade.study.arms import Arm, Axis
from anysplade.study.cells import Cell
from anysplade.training.config import TrainingConfig

Name = Literal["norm", "tradeoff", "dynamics", "sensitivity", "controls", "main", "folding"]
PAPER: tuple[Name, ...] = ("norm", "tradeoff", "dynamics", "sensitivity", "controls", "main")  # on the paper's question
STUDIES: tuple[Name, ...] = (*PAPER, "folding")
# Options that train a bundled backbone in half a minute on one core.
SMALL: dict[str, Any] = {
    "steps": 90,
    "batch_size": 16,
    "learning_rate": 8e-4,
    "query_regularizer_weight": 3e-4,
    "document_regularizer_weight": 3e-4,
    "max_length": 64,
}
WEIGHTS = (1, 10, 100)  # times the regularizers' weights: the tradeoff's points
TARGETS: dict[str, Any] = {"query_active_dims": 16, "document_active_dims": 64}  # folding is compared at equal cost
LEVELS = (0.01, 0.003, 0.001, 0.0003)  # of the token logits above zero: the map's levels


@dataclass(frozen=True)
class StudyConfig:
    """The settings of a study.

    Args:
        name: norm, tradeoff, dynamics, sensitivity, controls or main, or all for these six; or folding.
        output: folder for the cells, and for one report on all studies that were run there.
        backbones: masked LMs: folders, hub ids or bundled names.
        data: training examples, in any form that train takes.
        collections: to evaluate on; most tables and figures show the first one.
        seeds: trainings for each row.
        k: the paper's divisor of the head; the main study also has half and twice this value.
        training: options of ``TrainingConfig`` for all cells.
        workers: cells at a time; by default one for each GPU, or for each core.
    """

    name: str
    _: KW_ONLY
    output: str
    backbones: tuple[str, ...] = tuple(BUNDLED)
    data: str = "python-docs"
    collections: tuple[str, ...] = ("python-docs",)
    seeds: int = 3
    k: float = 8.0
    training: Mapping[str, Any] = field(default_factory=lambda: dict(SMALL))
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.name != "all" and self.name not in STUDIES:
            hint = did_you_mean(self.name, STUDIES, cutoff=0.6)
            raise OptionError(f"{self.name!r} is not a study; choose one of {', '.join(STUDIES)}, or all{hint}")
        for name, value in (("seeds", self.seeds), ("workers", self.workers)):
            if value is not None and value < 1:
                raise OptionError(f"{name} is {value}: it must be at least 1")
        if not 1 < self.k < float("inf"):
            raise OptionError(f"k is {self.k:g}: it divides the head, so it must be above 1")
        if not self.backbones or not self.collections:
            raise OptionError("a study needs at least one backbone and one collection")
        for name, named in (("backbones", self.backbones), ("collections", self.collections)):
            short = [Path(one).name for one in named]
            if len(set(short)) < len(short):
                raise OptionError(f"{name}: two have the same name, {', '.join(short)}; the report could not tell them apart")
        TrainingConfig("backbone", "data", output="run", **self.training)  # refuses impossible values

    @property
    def names(self) -> tuple[Name, ...]:
        return PAPER if self.name == "all" else (self.name,)  # type: ignore[return-value]


@dataclass(frozen=True)
class Row:
    """One line of a study: the same training with several seeds."""

    backbone: str  # as the report names it
    key: Arm
    arm: str  # its label
    cells: tuple[Cell, ...]  # by seed
    axis: Axis


# ---------------------------------------------------------------------------------------- the rows


def plan(name: Name, config: StudyConfig, norms: Mapping[str, float], cased: Collection[str] = ()) -> list[Row]:
    """The rows of a study.

    Args:
        norms: mean row norm of each backbone's decoder, for the controls that take another backbone's norm.
        cased: the backbones whose vocabulary can be folded by case.
    """
    rows = []
    for backbone in config.backbones:
        arm = partial(_row, config, backbone)
        raw, scaled, auto = arm(Arm.RAW), arm(Arm.FIXED, k=config.k), arm(Arm.AUTO, k="auto", shift="auto")
        if name in ("norm", "dynamics"):
            rows += [raw, scaled, auto]
        elif name == "folding":
            target = partial(arm, k="auto", shift="auto", fold="none", mute=False, **TARGETS)
            rows.append(target(Arm.AUTO))
            if backbone in cased:
                rows.append(target(Arm.BY_CASE, fold="case"))
            rows.append(target(Arm.BY_STEM, fold="stem"))
            rows.append(target(Arm.MUTED, fold="case" if backbone in cased else "none", mute=True))
        elif name == "main":
            rows += [raw, *(arm(Arm.FIXED, k=k) for k in (config.k / 2, config.k, config.k * 2)), auto]
        elif name == "tradeoff":
            for weight in WEIGHTS:
                weights = {
                    side: config.training.get(side, getattr(TrainingConfig, side)) * weight
                    for side in ("query_regularizer_weight", "document_regularizer_weight")
                }
                point = Axis(weight=weights["document_regularizer_weight"])
                rows.append(arm(Arm.RAW, axis=point, **weights))
                rows.append(arm(Arm.FIXED, axis=point, k=config.k, **weights))
                rows.append(arm(Arm.AUTO, axis=point, k="auto", shift="auto", **weights))
        elif name == "sensitivity":
            powers = [2.0**power for power in range(6)]
            rows += [arm(Arm.FIXED if k > 1 else Arm.RAW, axis=Axis(k=k), k=k) for k in powers]
            rows.append(auto)
            for k in powers[:4]:
                for level in LEVELS:
                    rows.append(arm(Arm.LEVEL, axis=Axis(k=k, level=level), seeds=1, level=level, k=k))
        else:
            rows += [raw, scaled, auto, *_controls(config, arm, norms, backbone)]
    return rows


def _controls(config: StudyConfig, arm: Any, norms: Mapping[str, float], backbone: str) -> list[Row]:
    """Heads that differ in one thing from the raw head or from the paper's."""
    k = config.k
    rate = config.training.get("learning_rate", TrainingConfig.learning_rate)
    rows = [
        arm(Arm.BIAS_KEPT, k=k, bias="keep"),
        arm(Arm.LEFT_TIED, edits=(("tied", k),)),
        arm(Arm.FOLDED, edits=(("folded", k),)),
        # Adam's steps do not change with the scale of a gradient, so W with a scalar 1/k behind it moves as W/k does
        # at a kth of the learning rate.
        arm(Arm.RUNTIME_SCALAR, k=k, head_learning_rate=rate / k),
        arm(Arm.UNTIED, edits=(("untied", 1.0),)),
        arm(Arm.LARGER_STEPS, edits=(("untied", 1.0),), head_learning_rate=rate * k),
        arm(Arm.SMALL_NORM, edits=(("scaled", k), ("folded", 1 / k))),
        arm(Arm.TEMPERATURE, spread_of=k),
        arm(Arm.SHIFT_ALONE, shift="auto"),
        arm(Arm.SCALE_ALONE, k="auto"),
    ]
    low, high = min(norms.values()), max(norms.values())
    for key, norm in ((Arm.LOWEST_NORM, low), (Arm.HIGHEST_NORM, high)):
        if abs(norms[backbone] / norm - 1) > 0.01:  # otherwise it is the raw head
            rows.append(arm(key, edits=(("scaled", norms[backbone] / norm),)))
    return rows


def _row(config: StudyConfig, backbone: str, key: Arm, axis: Axis | None = None, seeds: int | None = None, **changes: Any) -> Row:
    apart = {name: changes.pop(name) for name in ("edits", "level", "spread_of") if name in changes}
    options = {"k": 1.0, "shift": 0.0} | dict(config.training) | changes
    cells = tuple(
        Cell(backbone, config.data, options | {"seed": seed}, **apart) for seed in range(min(seeds or config.seeds, config.seeds))
    )
    k = options["k"] if key in (Arm.FIXED, Arm.LEVEL) else config.k
    return Row(Path(backbone).name, key, key.label(k, apart.get("level")), cells, axis or Axis())
