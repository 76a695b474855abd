import numpy as np
import pytest

from anysplade.search import exact


@pytest.mark.parametrize("k", [1, 2, 5, 30, 200])
def test_the_nearest_are_those_of_a_whole_ranking(k, monkeypatch):
    monkeypatch.setattr(exact, "_BLOCK", 200)  # two queries at a time
    generator = np.random.default_rng(k)
    queries, documents = (generator.integers(-3, 4, (rows, 2)).astype(np.float32) for rows in (5, 100))  # with ties
    for scores, (places, found) in zip(queries @ documents.T, exact.nearest(queries, documents, k), strict=True):
        order = np.argsort(-scores, kind="stable")[:k]
        assert places.tolist() == order.tolist()
        assert found.tolist() == scores[order].tolist()
