"""The values that options of models and of encoding can have, without the libraries that carry them out."""

from typing import Literal

Choice = float | Literal["auto"]  # of k and of shift
BiasPolicy = Literal["scale", "keep"]
Precision = Literal["float32", "bfloat16", "int8", "auto"]  # of encoding
Runtime = Literal["auto", "torch", "openvino"]  # of encoding
Pooling = Literal["max", "sum"]
Role = Literal["query", "document"]
QueryEncoder = Literal["mlm", "idf", "static"]
Fold = Literal["none", "case", "stem"]  # which terms share a dimension

_FEW_TEXTS = 100  # OpenVINO pays from some 250 texts of 22 million parameters' model on, from fewer of a larger one's


def runtime_for(texts: int, runtime: Runtime, precision: Precision) -> Runtime:
    """What ``"auto"`` means for so many texts: ``"torch"`` for fewer than 100, since making a model ready for OpenVINO takes
    seconds; int8 needs that in any case.
    """
    return "torch" if runtime == "auto" and precision != "int8" and texts < _FEW_TEXTS else runtime
