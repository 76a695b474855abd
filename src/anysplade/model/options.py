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
