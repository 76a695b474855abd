import pytest

from anysplade import evaluate, load_collection


@pytest.fixture
def pair(backbone, collection_folder):
    collection = load_collection(collection_folder)
    return collection, [evaluate(model, collection, ["nDCG@10", "RR@10"]) for model in ("bm25", backbone)]
