"""The variants of the head that a study trains, called arms, and the quantities that a study varies within an arm."""

from dataclasses import dataclass
from enum import StrEnum


class Arm(StrEnum):
    """A variant of the head: its key in ``study.json`` and a template of its label in reports."""

    RAW = "raw", "raw"
    FIXED = "fixed k", "k={k:g}"
    AUTO = "auto", "auto"
    LEVEL = "k and level", "k={k:g}, level {level:.2%}"
    BIAS_KEPT = "bias kept", "k={k:g}, bias kept"
    LEFT_TIED = "left tied", "k={k:g}, left tied"
    FOLDED = "folded", "1/{k:g} folded into the LayerNorm, tied"
    RUNTIME_SCALAR = "runtime scalar", "runtime scalar 1/{k:g}"
    UNTIED = "untied", "untied, not scaled"
    LARGER_STEPS = "larger steps", "head's learning rate x{k:g}, not scaled"
    SMALL_NORM = "small norm", "W/{k:g}, LayerNorm x{k:g}"
    TEMPERATURE = "temperature", "temperature for the spread of k={k:g}"
    SHIFT_ALONE = "shift alone", "shift alone"
    SCALE_ALONE = "scale alone", "scale alone"
    LOWEST_NORM = "lowest norm", "norm of the lowest backbone"
    HIGHEST_NORM = "highest norm", "norm of the highest backbone"
    BY_CASE = "by case", "by case"
    BY_STEM = "by stem", "by case and stem"
    MUTED = "muted", "by case, punctuation muted"

    _template: str

    def __new__(cls, key: str, template: str) -> "Arm":
        arm = str.__new__(cls, key)
        arm._value_, arm._template = key, template
        return arm

    def label(self, k: float, level: float | None = None) -> str:
        """The label of the arm for a value of k and of the level."""
        return self._template.format(k=k, level=level)


@dataclass(frozen=True)
class Axis:
    """The quantities that differ between rows of the same arm; None if a study does not vary them."""

    k: float | None = None
    level: float | None = None
    weight: float | None = None  # of the regularizers
