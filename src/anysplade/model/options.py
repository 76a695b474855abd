"""Allowed values of the options of models and encoding, without importing the libraries that implement them."""

from numbers import Integral, Real
from os import PathLike, fspath
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from anysplade.errors import OptionError

Choice = float | Literal["auto"]  # of k and of shift
BiasPolicy = Literal["scale", "keep"]
Precision = Literal["float32", "bfloat16", "int8", "auto"]  # of encoding
Runtime = Literal["auto", "torch", "openvino"]  # of encoding
Pooling = Literal["max", "sum"]
Role = Literal["query", "document"]
QueryEncoder = Literal["mlm", "idf", "static"]
Form = Literal["logits", "vector", "terms"]  # what an exported network gives
Fold = Literal["none", "case", "stem"]  # which terms share a dimension

OPEN_ENCODER = "give a SparseEncoder; anysplade.open_encoder opens one"  # the fix if another type is given

_FEW_TEXTS = 100  # OpenVINO saves time from about 250 texts with a model of 22 million parameters, and sooner with larger ones


def runtime_for(texts: int, runtime: Runtime, precision: Precision) -> Runtime:
    """Resolve ``"auto"`` for a number of texts: preparing a model for OpenVINO takes seconds, but int8 needs it in any case."""
    return "torch" if runtime == "auto" and precision != "int8" and texts < _FEW_TEXTS else runtime


def checked_option(name: str, value: Any, kind: Any) -> Any:
    """The value of an option, converted to its type: a whole number may be written 2.0, and a text may be a path.

    Raises OptionError for a value of another type, such as a fraction for a whole number, or a value that is not among the choices.
    """
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    choices = [choice for one in kinds if get_origin(one) is Literal for choice in get_args(one)]
    if value is None and NoneType in kinds:
        return None
    if isinstance(value, str) and (str in kinds or value in choices):
        return value
    if str in kinds and isinstance(value, PathLike):
        return fspath(value)
    if bool in kinds and isinstance(value, bool):
        return value
    if isinstance(value, Real) and not isinstance(value, bool):
        if float in kinds:
            return value if isinstance(value, int | float) else float(value)
        if int in kinds and isinstance(value, Integral):
            return int(value)
        if int in kinds and float(value).is_integer():
            return int(float(value))
    wanted = {str: "a text", bool: "true or false", float: "a number", int: "a whole number", NoneType: "none"}
    named = [wanted[one] for one in kinds if one in wanted] + [repr(choice) for choice in choices]
    shown = " ".join(repr(value).split())[:80]
    raise OptionError(f"{name} is {shown}: it must be {' or '.join(named) or 'a list of texts'}")


def checked_batch_tokens(value: Any) -> int | None:
    """``batch_tokens`` as an int, or None; raises OptionError unless it is a whole number of at least 1."""
    checked: int | None = checked_option("batch_tokens", value, int | None)
    if checked is not None and checked < 1:
        raise OptionError(f"`batch_tokens` is {checked}: it is at least 1")
    return checked


class Window(NamedTuple):
    """The tokens of a passage, and how far the next one begins after it."""

    length: int
    stride: int  # at most the length

    def __str__(self) -> str:
        return str(self.length) if self.stride == self.length else f"{self.length}:{self.stride}"


def checked_passages(value: Any) -> Window | None:
    """The window that ``"128"`` or ``"128:64"`` stands for; raises OptionError for anything else but None."""
    checked = checked_option("passages", value, int | str | None)
    if checked is None:
        return None
    length, colon, stride = str(checked).partition(":")
    numbers = [length, stride] if colon else [length, length]
    if not all(number.isascii() and number.isdigit() and 0 < int(number) <= int(length) for number in numbers):
        raise OptionError(
            f"`passages` is {str(checked)[:80]}: give the tokens of a passage, such as 128, or with those after which the next one "
            "begins, at most as many, 128:64"
        )
    return Window(*map(int, numbers))
