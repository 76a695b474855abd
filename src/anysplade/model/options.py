"""The values that options of models and of encoding can have, without the libraries that carry them out."""

from typing import Literal

Choice = float | Literal["auto"]  # of k and of shift
BiasPolicy = Literal["scale", "keep"]
Precision = Literal["float32", "bfloat16", "auto"]  # of encoding
WeightType = Literal["float32", "float16"]  # of stored vectors
Pooling = Literal["max", "sum"]
Role = Literal["query", "document"]
QueryEncoder = Literal["mlm", "idf", "static"]
