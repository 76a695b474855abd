"""The plan of each study: the experiments of "Rescaling MLM-Head for Neural Sparse Retrieval" (arXiv 2606.18811), and controls.

A study is a list of rows. A row is a training with one set of options and has a cell for each seed. Studies share cells.
"""

from collections.abc import Collection, Mapping
from dataclasses import KW_ONLY, asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from anysplade._common.arguments import did_you_mean
from anysplade._common.hashing import DataHash
from anysplade.errors import OptionError
from anysplade.model.backbones import BUNDLED
from anysplade.model.calibration import ACTIVE_SHARE, FEWEST_TERMS, MEAN_EXCESS, MEAN_EXCESS_SCALE_ONLY
from anysplade.study.arms import Arm, Axis
from anysplade.study.inputs import collection_hash, model_fingerprint, read_pairs
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
WEIGHTS = (1, 10, 100)  # factors of the regularizers' weights in the tradeoff study
TARGETS: dict[str, Any] = {"query_active_dims": 16, "document_active_dims": 64}  # of the folding study, for equal cost
LEVELS = (0.01, 0.003, 0.001, 0.0003)  # shares of the token logits above zero, in the sensitivity study
_AUTO: dict[str, Any] = {"k": "auto", "shift": "auto"}
_SAME_NORM = 0.01  # relative difference below which two norms count as equal

# A change of a checkpoint before the training:
#   untied    the decoder gets its own weights; nothing else changes
#   scaled    W / value and b / value, untied
#   tied      W / value in place, where W is also the input embeddings; b / value
#   folded    the LayerNorm before the decoder / value, b / value; W and its tie stay
Edit = Literal["untied", "scaled", "tied", "folded"]
Edits = tuple[tuple[Edit, float], ...]  # (edit, value), in order


@dataclass(frozen=True)
class Cell:
    """A training and its evaluation."""

    backbone: str  # a masked LM's folder or hub id
    data: str  # training examples, in any form that ``train`` takes
    options: Mapping[str, Any]  # of ``TrainingConfig``, with ``k``, ``shift`` and ``seed``
    edits: Edits = ()
    level: float | None = None  # share of the token logits above zero at the start; replaces the number in ``shift``
    spread_of: float | None = None  # a k: the temperature gives the scores at the start the standard deviation that W / k has

    @property
    def config(self) -> TrainingConfig:
        """All options of the training, with the unedited backbone."""
        return TrainingConfig(self.backbone, self.data, output="", **self.options)

    @property
    def hash(self) -> str:
        """Hash of everything that determines the numbers: all options, the edits, and the content of what the options name."""
        config = self.config
        options = asdict(config)
        for name in ("output", "report_to", "texts", "dev_split"):  # without effect, or hashed with the data and the dev collection
            del options[name]
        options |= {
            "backbone": model_fingerprint(config.backbone) or config.backbone,
            "data": read_pairs(config)[1],
            "teacher": config.teacher and (model_fingerprint(config.teacher) or config.teacher),
            "dev": config.dev and collection_hash(config.dev, config.dev_split),
        }
        calibrated = "auto" in (config.k, config.shift) or config.on_collapse == "recalibrate"
        rule = [ACTIVE_SHARE, MEAN_EXCESS, MEAN_EXCESS_SCALE_ONLY, FEWEST_TERMS] if calibrated else None
        return DataHash([sorted(options.items()), self.edits, self.level, self.spread_of, rule]).hexdigest()[:16]


@dataclass(frozen=True)
class Row:
    """A line of a study: one training with several seeds."""

    backbone: str  # name in the report
    key: Arm
    arm: str  # label of the arm
    cells: tuple[Cell, ...]  # by seed
    axis: Axis


@dataclass(frozen=True)
class StudyConfig:
    """The settings of a study.

    Args:
        name: norm, tradeoff, dynamics, sensitivity, controls or main; all for these six; or folding.
        output: folder for the cells and for one report on all studies in the folder.
        backbones: masked LMs: folders, hub ids or bundled names.
        data: training examples, in any form that ``train`` takes.
        collections: to evaluate on; most tables and figures show the first one.
        seeds: number of trainings per row.
        k: the paper's divisor of the head; the main study also has half and twice this value.
        training: options of ``TrainingConfig`` for all cells.
        workers: number of cells that run at the same time; by default one per GPU, or one per core.
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
        for name, paths in (("backbones", self.backbones), ("collections", self.collections)):
            short = [Path(path).name for path in paths]
            if len(set(short)) < len(short):
                raise OptionError(f"{name}: two have the same name, {', '.join(short)}; the report could not tell them apart")
        TrainingConfig("backbone", "data", output="run", **self.training)  # rejects impossible values

    @property
    def names(self) -> tuple[Name, ...]:
        return PAPER if self.name == "all" else (self.name,)  # type: ignore[return-value]


def plan(name: Name, config: StudyConfig, norms: Mapping[str, float], cased: Collection[str] = ()) -> list[Row]:
    """The rows of a study; ``norms`` are the decoders' mean row norms, and ``cased`` the backbones that can be folded by case."""
    rows = []
    for backbone in config.backbones:
        arm = partial(_row, config, backbone)
        raw, scaled, auto = arm(Arm.RAW), arm(Arm.FIXED, k=config.k), arm(Arm.AUTO, **_AUTO)
        if name in ("norm", "dynamics"):
            rows += [raw, scaled, auto]
        elif name == "folding":
            folding = partial(arm, fold="none", mute=False, **_AUTO, **TARGETS)
            rows.append(folding(Arm.AUTO))
            if backbone in cased:
                rows.append(folding(Arm.BY_CASE, fold="case"))
            rows.append(folding(Arm.BY_STEM, fold="stem"))
            rows.append(folding(Arm.MUTED, fold="case" if backbone in cased else "none", mute=True))
        elif name == "main":
            rows += [raw, *(arm(Arm.FIXED, k=k) for k in (config.k / 2, config.k, config.k * 2)), auto]
        elif name == "tradeoff":
            sides = ("query_regularizer_weight", "document_regularizer_weight")
            for factor in WEIGHTS:
                weights = {side: config.training.get(side, getattr(TrainingConfig, side)) * factor for side in sides}
                weighted = partial(arm, axis=Axis(weight=weights["document_regularizer_weight"]), **weights)
                rows += [weighted(Arm.RAW), weighted(Arm.FIXED, k=config.k), weighted(Arm.AUTO, **_AUTO)]
        elif name == "sensitivity":
            powers = [2.0**power for power in range(6)]
            rows += [arm(Arm.FIXED if k > 1 else Arm.RAW, axis=Axis(k=k), k=k) for k in powers]
            rows.append(auto)
            for k in powers[:4]:
                rows += [arm(Arm.LEVEL, axis=Axis(k=k, level=level), seeds=1, level=level, k=k) for level in LEVELS]
        else:
            rows += [raw, scaled, auto, *_controls(config, arm, norms, backbone)]
    return rows


def _controls(config: StudyConfig, arm: Any, norms: Mapping[str, float], backbone: str) -> list[Row]:
    """Heads that differ in one thing from the raw head or from the paper's head."""
    k = config.k
    rate = config.training.get("learning_rate", TrainingConfig.learning_rate)
    rows = [
        arm(Arm.BIAS_KEPT, k=k, bias="keep"),
        arm(Arm.LEFT_TIED, edits=(("tied", k),)),
        arm(Arm.FOLDED, edits=(("folded", k),)),
        # Adam's steps do not depend on the scale of a gradient. So W with a scalar 1/k behind it moves like W/k does at a
        # learning rate that is k times smaller.
        arm(Arm.RUNTIME_SCALAR, k=k, head_learning_rate=rate / k),
        arm(Arm.UNTIED, edits=(("untied", 1.0),)),
        arm(Arm.LARGER_STEPS, edits=(("untied", 1.0),), head_learning_rate=rate * k),
        arm(Arm.SMALL_NORM, edits=(("scaled", k), ("folded", 1 / k))),
        arm(Arm.TEMPERATURE, spread_of=k),
        arm(Arm.SHIFT_ALONE, shift="auto"),
        arm(Arm.SCALE_ALONE, k="auto"),
    ]
    for key, norm in ((Arm.LOWEST_NORM, min(norms.values())), (Arm.HIGHEST_NORM, max(norms.values()))):
        ratio = norms[backbone] / norm
        if abs(ratio - 1) > _SAME_NORM:  # otherwise it is the raw head
            rows.append(arm(key, edits=(("scaled", ratio),)))
    return rows


def _row(config: StudyConfig, backbone: str, key: Arm, axis: Axis | None = None, seeds: int | None = None, **changes: Any) -> Row:
    of_cell = {name: changes.pop(name) for name in ("edits", "level", "spread_of") if name in changes}
    options = {"k": 1.0, "shift": 0.0} | dict(config.training) | changes
    count = min(seeds or config.seeds, config.seeds)
    cells = tuple(Cell(backbone, config.data, options | {"seed": seed}, **of_cell) for seed in range(count))
    k = options["k"] if key in (Arm.FIXED, Arm.LEVEL) else config.k
    return Row(Path(backbone).name, key, key.label(k, of_cell.get("level")), cells, axis or Axis())
