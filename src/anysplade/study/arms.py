"""What a study does to a backbone's head: an arm has a key, which code refers to, and a label, which people read."""

from enum import StrEnum


class Arm(StrEnum):
    """A head as a study trains it. The values are kept in ``study.json``."""

    RAW = "raw"
    FIXED = "fixed k"
    AUTO = "auto"
    LEVEL = "k and level"
    BIAS_KEPT = "bias kept"
    LEFT_TIED = "left tied"
    FOLDED = "folded"
    RUNTIME_SCALAR = "runtime scalar"
    UNTIED = "untied"
    LARGER_STEPS = "larger steps"
    SMALL_NORM = "small norm"
    TEMPERATURE = "temperature"
    SHIFT_ALONE = "shift alone"
    SCALE_ALONE = "scale alone"
    LOWEST_NORM = "lowest norm"
    HIGHEST_NORM = "highest norm"


_LABELS = {
    Arm.RAW: "raw",
    Arm.FIXED: "k={k:g}",
    Arm.AUTO: "auto",
    Arm.LEVEL: "k={k:g}, level {level:.2%}",
    Arm.BIAS_KEPT: "k={k:g}, bias kept",
    Arm.LEFT_TIED: "k={k:g}, left tied",
    Arm.FOLDED: "1/{k:g} folded into the LayerNorm, tied",
    Arm.RUNTIME_SCALAR: "runtime scalar 1/{k:g}",
    Arm.UNTIED: "untied, not scaled",
    Arm.LARGER_STEPS: "head's learning rate x{k:g}, not scaled",
    Arm.SMALL_NORM: "W/{k:g}, LayerNorm x{k:g}",
    Arm.TEMPERATURE: "temperature for the spread of k={k:g}",
    Arm.SHIFT_ALONE: "shift alone",
    Arm.SCALE_ALONE: "scale alone",
    Arm.LOWEST_NORM: "norm of the lowest backbone",
    Arm.HIGHEST_NORM: "norm of the highest backbone",
}


def label(arm: Arm, k: float, level: float | None = None) -> str:
    """What a report calls an arm that divides by k."""
    return _LABELS[arm].format(k=k, level=level)
