import random
from collections import Counter

from anysplade import load_pairs
from anysplade.data.pairs import read_sample, sample_pairs
from anysplade.data.sampling import reservoir


def test_each_item_is_as_likely_as_another():
    draw = random.Random(0)
    drawn = Counter(item for _ in range(2000) for item in reservoir(iter(range(10)), 3, draw))
    assert all(500 < drawn[item] < 700 for item in range(10))  # 600 expected
    assert reservoir("ab", 3, draw) == ["a", "b"]


def test_the_sample_of_a_source_is_the_one_that_a_training_takes(collection_folder):
    assert read_sample(collection_folder, 1) == sample_pairs(load_pairs(collection_folder), 1)
