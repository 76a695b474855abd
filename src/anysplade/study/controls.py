"""The pairs of arms that the controls study compares: each pair differs in one thing."""

from typing import NamedTuple

from anysplade.study.arms import Arm


class Control(NamedTuple):
    """Two arms that differ in one thing, and what a difference between them means."""

    about: str  # what the two arms differ in
    one: Arm
    other: Arm
    better: str  # what follows if the first arm is better
    worse: str  # what follows if it is worse


CONTROLS = [Control(*row) for row in (
    ("scale, with the step size that Adam gives it", Arm.FIXED, Arm.RAW,
     "dividing W and b by k helps, as in the paper", "dividing W and b by k does harm"),
    ("scale of the scores alone", Arm.RUNTIME_SCALAR, Arm.RAW,
     "smaller scores help even at unchanged relative steps", "smaller scores alone do harm"),
    ("relative step size alone", Arm.LARGER_STEPS, Arm.UNTIED,
     "larger relative steps of the head help without any scale", "larger relative steps of the head alone do harm"),
    ("relative step size, given the scale", Arm.FIXED, Arm.RUNTIME_SCALAR,
     "Adam's k times larger relative steps on W help, at the same scale",
     "Adam's k times larger relative steps on W do harm, at the same scale"),
    ("where the scale sits (same function at the start)", Arm.FIXED, Arm.FOLDED,
     "the same function at the start ends better with W/k than with the LayerNorm scaled and the tie kept",
     "the same function at the start ends worse with W/k than with the LayerNorm scaled and the tie kept"),
    ("norm of W without the scale", Arm.SMALL_NORM, Arm.RAW,
     "a small norm of W helps although the function at the start is the raw one",
     "a small norm of W by itself does harm: it is not the norm that helps"),
    ("untying alone", Arm.UNTIED, Arm.RAW, "untying helps by itself", "untying by itself does harm"),
    ("tie under W/k", Arm.FIXED, Arm.LEFT_TIED,
     "leaving the tie loses: the input embeddings shrink too", "leaving the tie is better here"),
    ("bias", Arm.BIAS_KEPT, Arm.FIXED, "keeping the bias is better than dividing it", "keeping the bias is worse than dividing it"),
    ("temperature", Arm.TEMPERATURE, Arm.RAW, "a temperature in the loss helps", "a temperature in the loss does harm"),
    ("temperature against scale", Arm.FIXED, Arm.TEMPERATURE,
     "the scale does more than a temperature of the same spread of scores",
     "the scale does less than a temperature of the same spread of scores"),
    ("level alone", Arm.SHIFT_ALONE, Arm.RAW,
     "lowering the level helps, at the raw head's norm", "lowering the level alone does harm"),
    ("level against scale", Arm.SHIFT_ALONE, Arm.FIXED,
     "the level does more than the paper's scale", "the level does less than the paper's scale"),
    ("scale after level", Arm.AUTO, Arm.SHIFT_ALONE,
     "choosing the scale too adds to the level", "choosing the scale too takes from the level"),
    ("level after scale", Arm.AUTO, Arm.SCALE_ALONE,
     "lowering the level adds to a chosen scale", "lowering the level takes from a chosen scale"),
    ("another backbone's higher norm", Arm.HIGHEST_NORM, Arm.RAW, "a larger norm helps", "a larger norm does harm"),
    ("another backbone's lower norm", Arm.LOWEST_NORM, Arm.RAW, "a smaller norm helps", "a smaller norm does harm"),
)]  # fmt: skip
