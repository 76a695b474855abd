"""Read and hash the inputs of cells, each once per process."""

from functools import cache

from anysplade._common.hashing import DataHash
from anysplade.data.collections import Collection, Pair, data_hash, load_collection
from anysplade.model.saved import fingerprint, resolve_model
from anysplade.training.config import TrainingConfig
from anysplade.training.inputs import read_examples


@cache
def model_fingerprint(model: str) -> str | None:
    return fingerprint(resolve_model(model))


def read_pairs(config: TrainingConfig) -> tuple[list[Pair], str]:
    """Training examples and their hash."""
    return _read_pairs(config.data, config.texts, config.negatives, config.teacher)


@cache
def _read_pairs(data: str, texts: str | None, negatives: int | None, teacher: str | None) -> tuple[list[Pair], str]:
    config = TrainingConfig("", data, output="", texts=texts, negatives=negatives, teacher=teacher)
    pairs = list(read_examples(config)[0])
    return pairs, DataHash(pairs).hexdigest()


@cache
def read_collection(name: str, split: str = "test") -> Collection:
    return load_collection(name, split)


@cache
def collection_hash(name: str, split: str = "test") -> str:
    return data_hash(read_collection(name, split))


def clear_caches() -> None:
    """Forget what was read, since files may have changed."""
    for cached in (model_fingerprint, _read_pairs, read_collection, collection_hash):
        cached.cache_clear()
