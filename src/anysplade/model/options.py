"""The values that options of models and of encoding can have, without the libraries that carry them out."""

from numbers import Integral, Real
from os import PathLike, fspath
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from anysplade.errors import OptionError

Choice = float | Literal["auto"]  # of k and of shift
BiasPolicy = Literal["scale", "keep"]
Precision = Literal["float32", "bfloat16", "int8", "auto"]  # of encoding
Runtime = Literal["auto", "torch", "openvino"]  # of encoding
Pooling = Literal["max", "sum"]
Role = Literal["query", "document"]
QueryEncoder = Literal["mlm", "idf", "static"]
Fold = Literal["none", "case", "stem"]  # which terms share a dimension

OPEN_ENCODER = "give a SparseEncoder; anysplade.open_encoder opens one"  # the fix where something else is given

_FEW_TEXTS = 100  # OpenVINO pays from some 250 texts of 22 million parameters' model on, from fewer of a larger one's


def runtime_for(texts: int, runtime: Runtime, precision: Precision) -> Runtime:
    """What ``"auto"`` means for so many texts: ``"torch"`` for fewer than 100, since making a model ready for OpenVINO takes
    seconds; int8 needs that in any case.
    """
    return "torch" if runtime == "auto" and precision != "int8" and texts < _FEW_TEXTS else runtime


def checked_option(name: str, value: Any, kind: Any) -> Any:
    """A value of an option as its type has it: a whole number may be written 2.0, and a text be given as a path.

    Raises:
        OptionError: a value of another type, such as a fraction for a whole number, or none of the choices.
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
