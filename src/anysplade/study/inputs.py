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
    named = {name: getattr(config, name) for name in ("texts", "negatives", "teacher")}  # all else has no effect on them
    return _read_pairs(TrainingConfig("", config.data, output="", **named))


@cache
def _read_pairs(config: TrainingConfig) -> tuple[list[Pair], str]:
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
