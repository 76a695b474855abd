import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

from anysplade import OptionError
from anysplade.training.batches import DistinctBatches, check_batch_size, distinct_examples


def dataset(positives, **columns):
    rows = {"query": [f"q{i}" for i in range(len(positives))], "positive": [f"p{i}" for i in positives]}
    return datasets.Dataset.from_dict(rows | columns)


def batches(kind, data, size, epoch=0):
    sampler = kind(data, batch_size=size, drop_last=True, valid_label_columns=["label"], generator=torch.Generator(), seed=3)
    sampler.set_epoch(epoch)
    return list(sampler), len(sampler)


def test_without_many_duplicates_the_batches_are_those_of_sentence_transformers():
    data = dataset([i % 90 for i in range(100)])
    for epoch in (0, 1):
        assert batches(DistinctBatches, data, 8, epoch) == batches(NoDuplicatesBatchSampler, data, 8, epoch)
    assert batches(DistinctBatches, data, 8, 0) != batches(DistinctBatches, data, 8, 1)


@settings(deadline=None)
@given(st.lists(st.integers(0, 12), min_size=2, max_size=60), st.integers(2, 6))
def test_as_many_full_batches_as_promised_or_none(positives, size):
    data = dataset(positives)
    if min(len(set(positives)), size) < size:
        with pytest.raises(OptionError):
            check_batch_size(data, size, 1, True, "data")
        return
    check_batch_size(data, size, 1, True, "data")
    found, promised = batches(DistinctBatches, data, size)
    assert len(found) == promised == len(positives) // size
    for batch in found:
        assert len({positives[i] for i in batch}) == len(batch) == size


def test_examples_that_come_again_are_said(caplog):
    found, promised = batches(DistinctBatches, dataset([0] * 50 + [1, 2, 3, 4]), 3)
    assert len(found) == promised == 18
    assert "an epoch's 18 batches use" in caplog.text
    assert "of 54 examples, some of them several times" in caplog.text


def test_an_epoch_whose_shuffles_give_no_batch_takes_the_examples_that_make_one():
    """Example 0 shares a text with every other: whoever starts with it fills no batch of three."""
    data = datasets.Dataset.from_dict(
        {"query": ["a", "a", "b", "c"], "positive": ["b", "d", "e", "f"], "negative_1": ["c", "g", "h", "i"]}
    )
    for epoch in range(20):
        found, promised = batches(DistinctBatches, data, 3, epoch)
        assert [sorted(batch) for batch in found] == [[1, 2, 3]] * promised


def test_what_was_looked_at():
    data = dataset([0, 0, 1, 2, 2, 3])
    assert distinct_examples(data, ["query", "positive"], 3) == [0, 2, 3]
    assert distinct_examples(data, ["query", "positive"], 9) == [0, 2, 3, 5]


@pytest.mark.parametrize(
    "positives, negatives, size, processes, contrastive, message",
    [
        ([0, 1, 2, 3, 4] * 40, None, 32, 1, True, "200 examples with 5 distinct positives give 5; use `batch_size=5`$"),
        ([0, 1, 2, 3, 4] * 40, None, 32, 2, True, "give 5; use `batch_size=4`$"),
        (range(200), [0] * 200, 32, 1, True, "200 examples with 200 distinct positives give 1; use `negatives=0`$"),
        (range(200), [0, 1, 2, 3] * 50, 32, 1, True, "give 4; use `batch_size=4` or `negatives=0`$"),
        ([0, 1, 2, 3] * 50, [0] * 200, 32, 1, True, "give 1; use `negatives=0` `batch_size=4`$"),
        ([0] * 200, [0] * 200, 32, 1, True, "1 distinct positives give 1; use examples with other documents$"),
        (range(10), None, 32, 1, True, "10 examples with 10 distinct positives give 10; use `batch_size=10`$"),
        (range(10), None, 32, 1, False, "a batch needs 32 examples, and 10 examples give 10; use `batch_size=10`$"),
    ],
)
def test_a_batch_that_cannot_be_filled(positives, negatives, size, processes, contrastive, message):
    columns = {} if negatives is None else {"negative_1": [f"n{i}" for i in negatives]}
    data = dataset(list(positives), **columns, label=[[1.0]] * len(positives))
    with pytest.raises(OptionError, match=message):
        check_batch_size(data, size, processes, contrastive, "data")
    check_batch_size(dataset(range(size)), size, processes, contrastive, "data")
