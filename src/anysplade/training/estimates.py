"""How long the stages of ``distil`` will take, from a measured encoding of a few texts with the dense model."""

import time
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from anysplade._common.progress import duration
from anysplade.data.corpus import iter_corpus
from anysplade.model.dense import encode_dense, open_dense

_TEXTS, _WARM_UP = 32, 4  # documents that are encoded for a measurement, and before it
_HEAD, _TRAINING, _SPARSE = 3.0, 4.5, 1.5  # time of a text in each stage, in terms of an encoding by the dense model
_QUERY = 0.3  # length of a query, in terms of a document


class Speed(NamedTuple):
    """Documents that the dense model encodes in a second."""

    cut: float  # as in training
    whole: float  # as far as the model reads

    def of_head(self, texts: int) -> str:
        """The time for training a head on as many texts, in words."""
        return _about(_HEAD * texts / self.cut)

    def of_training(self, pairs: int, negatives: int) -> str:
        """The time for training on as many pairs, each with these negatives."""
        return _about(_TRAINING * pairs * (1 + negatives + _QUERY) / self.cut)

    def of_comparison(self, documents: int, queries: int) -> str:
        """The time for encoding a collection with the dense and with the sparse model."""
        return _about((1 + _SPARSE) * (documents + _QUERY * queries) / self.whole)


def measure_speed(dense: str, corpus: str, max_length: int, precision: str) -> Speed:
    """Encode the first documents of the corpus as a training reads them, and whole."""
    texts = [document.full_text for _, document in islice(iter_corpus(corpus), _TEXTS)]
    return Speed(*_rates(dense, texts, max_length, precision))


def _rates(dense: str, texts: list[str], max_length: int, precision: str) -> Iterator[float]:
    for length, used in ((max_length, precision), (None, "float32")):
        model = open_dense(dense, length)
        encode_dense(model, texts[:_WARM_UP], "document", precision=used)
        start = time.perf_counter()
        encode_dense(model, texts, "document", precision=used)
        yield len(texts) / max(time.perf_counter() - start, 1e-6)


def _about(seconds: float) -> str:
    return f"about {duration(seconds)}"
