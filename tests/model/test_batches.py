from collections import deque
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import anysplade.model.batches as batches
from anysplade import OptionError, load_encoder
from anysplade.model.batches import Budget, batch_budget, make_batches, sparse_rows
from anysplade.model.encoding import Part, ahead, encode, encode_parts
from tiny import WORDS


@pytest.fixture(scope="module")
def encoder(backbone):
    return load_encoder(backbone, k=1, shift=0)


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 9000), max_size=60), most=st.integers(1, 20))
def test_batches_hold_every_text_once_within_the_budget(lengths, most):
    budget = Budget(1024, most)
    made = list(make_batches(np.array(lengths, np.int64), budget))
    assert sorted(i for batch in made for i in batch) == list(range(len(lengths)))
    for batch in made:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget.tokens
        assert len(batch) <= most
    for batch, after in pairwise(made):
        longest = max(lengths[i] for i in batch)
        assert longest >= min(lengths[i] for i in batch) >= max(lengths[i] for i in after)
        assert len(batch) == most or (len(batch) + 1) * longest > budget.tokens  # no more would have fitted


def test_tokens_per_batch(encoder, monkeypatch):
    """As asked; else 1,024 on a CPU, and on a GPU as many as half of its free memory holds, a power of two."""
    width = encoder.get_embedding_dimension()
    assert batch_budget(encoder) == Budget(1024, 2**24 // width)
    assert batch_budget(encoder, 5) == Budget(5, 2**24 // width)
    for wrong in (0, -1, 1.5, "many"):
        with pytest.raises(OptionError, match="batch_tokens"):
            encode(encoder, ["kabel"], "query", batch_tokens=wrong)
    found = []
    for free in (2**20, 2**28, 2**30, 2**37):
        monkeypatch.setattr(batches, "free_memory", lambda device, free=free: free)
        found.append(batch_budget(encoder))
        assert batch_budget(encoder, 77).tokens == 77
        assert found[-1].texts * width * 4 * 16 <= free or found[-1].texts == 1
    assert [budget.tokens for budget in found] == sorted(budget.tokens for budget in found)
    assert found[0].tokens == 1024
    assert found[-1] == Budget(65_536, 2**26 // width)
    per_token = batches._bytes_per_token(encoder, width, 4)
    for free, budget in zip((2**28, 2**30), found[1:3], strict=True):
        assert budget.tokens * per_token <= free / 4
        assert budget.tokens == 65_536 or 2 * budget.tokens * per_token > free / 4


def test_an_unfused_head_needs_memory_for_its_logits(encoder, backbone):
    stock = load_encoder(backbone, k=1, shift=0, fused=False)
    width = encoder.get_embedding_dimension()
    assert batches._bytes_per_token(stock, width, 4) == batches._bytes_per_token(encoder, width, 4) + 12 * width


@pytest.mark.parametrize("behind", [None, 0, 1, 2])
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_rows_come_in_order_however_late(behind, count):
    torch.manual_seed(0)
    dense = [None if i == 2 else torch.randn(i + 1, 7).relu() for i in range(count)]
    if count > 3:
        dense[3][1, 2] = torch.nan
    launched, got = deque(), []

    def launch():
        for i, vectors in enumerate(dense):
            launched.append(i)
            yield i, vectors

    for tag, rows in sparse_rows(launch(), behind):
        assert launched[-1] - tag <= 2 * (behind or 0)  # so many batches are in memory
        got.append(tag)
        if dense[tag] is None:
            assert rows is None
            continue
        np.testing.assert_array_equal(rows.matrix.toarray(), dense[tag].numpy())
        assert rows.matrix.has_sorted_indices
        assert rows.matrix.dtype == np.float32
        assert rows.finite.tolist() == dense[tag].isfinite().all(dim=1).tolist()
    assert got == list(range(count))


class _Machine:
    """Stands in for a GPU: counts when the host waits, and for which batch."""

    def __init__(self, monkeypatch):
        self.launched, self.waits = 0, []

        def entries(vectors, stream, ready):
            self.waits.append((self.launched, int(vectors[0, 0])))
            return entries_of(vectors, stream, ready)._replace(arrived=SimpleNamespace(synchronize=lambda: None))

        entries_of = batches._entries
        monkeypatch.setattr(batches, "_entries", entries)

    def run(self, count):
        for i in range(count):
            self.launched = i
            yield i, torch.full((2, 3), float(i))


def test_the_host_waits_once_per_batch_while_the_next_one_runs(monkeypatch):
    machine = _Machine(monkeypatch)
    got = [tag for tag, _ in sparse_rows(machine.run(5), behind=1)]
    assert got == list(range(5))
    assert machine.waits == [(1, 0), (2, 1), (3, 2), (4, 3), (4, 4)]


@pytest.mark.parametrize("behind", [0, 1])
def test_parts_end_where_they_end(behind, encoder, monkeypatch):
    """Batches of the next part are launched before the last rows of a part arrive."""
    rows_of = batches.sparse_rows
    monkeypatch.setattr("anysplade.model.encoding.sparse_rows", lambda given: rows_of(given, behind))
    monkeypatch.setattr("anysplade.model.batches._TOKENS", 12)
    texts = [" ".join(WORDS[i : i + i % 5]) for i in range(23)]
    known = encode(encoder, texts[4:9], "document")
    spans = [slice(0, 1), slice(1, 4), slice(4, 9), slice(9, 20), slice(20, 23)]
    parts = [Part(i, texts[span], str, known if i == 2 else None) for i, span in enumerate(spans)]
    found = list(encode_parts(encoder, parts, "document"))
    assert [part.tag for part, *_ in found] == [0, 1, 2, 3, 4]
    assert [longer for *_, longer in found] == [None, 0, None, 0, 0]  # one text, and known vectors, are not counted
    expected = encode(encoder, texts, "document").toarray()
    np.testing.assert_allclose(np.vstack([matrix.toarray() for _, matrix, _ in found]), expected, rtol=1e-4, atol=1e-5)


def test_preparing_ahead():
    """The next item is prepared while the caller has this one; errors arrive where their item would."""
    prepared = []

    def prepare(item):
        prepared.append(item)
        return 10 // item

    assert list(ahead([], prepare)) == []
    assert list(ahead([5], prepare)) == [(5, 2)]
    prepared.clear()
    run = ahead(iter([5, 2, 1]), prepare)
    assert next(run) == (5, 2)
    assert next(run) == (2, 5)
    assert set(prepared) <= {5, 2, 1}
    assert list(run) == [(1, 10)]
    assert prepared == [5, 2, 1]
    run = ahead([1, 0, 1], prepare)
    assert next(run) == (1, 10)
    with pytest.raises(ZeroDivisionError):
        next(run)
