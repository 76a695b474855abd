"""The pairs of arms that the controls study compares: each pair differs in one thing."""

from typing import NamedTuple

from anysplade.study.arms import Arm


class Control(NamedTuple):
    about: str  # what the two arms differ in
    one: Arm
    other: Arm
    better: str  # what follows if the first arm is better
    worse: str  # what follows if it is worse


CONTROLS = [
    Control(
        "scale, with the step size that Adam gives it", Arm.FIXED, Arm.RAW,
        "dividing W and b by k helps, as in the paper",
        "dividing W and b by k does harm",
    ),
    Control(
        "scale of the scores alone", Arm.RUNTIME_SCALAR, Arm.RAW,
        "smaller scores help even at unchanged relative steps",
        "smaller scores alone do harm",
    ),
    Control(
        "relative step size alone", Arm.LARGER_STEPS, Arm.UNTIED,
        "larger relative steps of the head help without any scale",
        "larger relative steps of the head alone do harm",
    ),
    Control(
        "relative step size, given the scale", Arm.FIXED, Arm.RUNTIME_SCALAR,
        "Adam's k times larger relative steps on W help, at the same scale",
        "Adam's k times larger relative steps on W do harm, at the same scale",
    ),
    Control(
        "where the scale sits (same function at the start)", Arm.FIXED, Arm.FOLDED,
        "the same function at the start ends better with W/k than with the LayerNorm scaled and the tie kept",
        "the same function at the start ends worse with W/k than with the LayerNorm scaled and the tie kept",
    ),
    Control(
        "norm of W without the scale", Arm.SMALL_NORM, Arm.RAW,
        "a small norm of W helps although the function at the start is the raw one",
        "a small norm of W by itself does harm: it is not the norm that helps",
    ),
    Control("untying alone", Arm.UNTIED, Arm.RAW, "untying helps by itself", "untying by itself does harm"),
    Control(
        "tie under W/k", Arm.FIXED, Arm.LEFT_TIED,
        "leaving the tie loses: the input embeddings shrink too",
        "leaving the tie is better here",
    ),
    Control(
        "bias", Arm.BIAS_KEPT, Arm.FIXED,
        "keeping the bias is better than dividing it",
        "keeping the bias is worse than dividing it",
    ),
    Control(
        "temperature", Arm.TEMPERATURE, Arm.RAW, "a temperature in the loss helps", "a temperature in the loss does harm"
    ),
    Control(
        "temperature against scale", Arm.FIXED, Arm.TEMPERATURE,
        "the scale does more than a temperature of the same spread of scores",
        "the scale does less than a temperature of the same spread of scores",
    ),
    Control(
        "level alone", Arm.SHIFT_ALONE, Arm.RAW,
        "lowering the level helps, at the raw head's norm",
        "lowering the level alone does harm",
    ),
    Control(
        "level against scale", Arm.SHIFT_ALONE, Arm.FIXED,
        "the level does more than the paper's scale",
        "the level does less than the paper's scale",
    ),
    Control(
        "scale after level", Arm.AUTO, Arm.SHIFT_ALONE,
        "choosing the scale too adds to the level",
        "choosing the scale too takes from the level",
    ),
    Control(
        "level after scale", Arm.AUTO, Arm.SCALE_ALONE,
        "lowering the level adds to a chosen scale",
        "lowering the level takes from a chosen scale",
    ),
    Control("another backbone's higher norm", Arm.HIGHEST_NORM, Arm.RAW, "a larger norm helps", "a larger norm does harm"),
    Control("another backbone's lower norm", Arm.LOWEST_NORM, Arm.RAW, "a smaller norm helps", "a smaller norm does harm"),
]  # fmt: skip
