import numpy as np
import pytest

from anysplade.search.exact import nearest
from anysplade.training.dense_mining import _nearest_on, nearest_in_blocks


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
@pytest.mark.parametrize("k", [1, 10, 200])
def test_the_nearest_in_blocks_are_the_nearest(size, k):
    """Whole numbers, so that products are exact and many are equal."""
    draw = np.random.default_rng(0)
    queries, documents = (draw.integers(-2, 3, (count, 6)).astype(np.float16) for count in (5, 150))
    expected = nearest(queries.astype(np.float32), documents.astype(np.float32), k)
    found = nearest_in_blocks(queries, documents, k, "cpu", size)
    on_device = _nearest_on("cpu", queries.astype(np.float32), documents, k)  # as on a GPU
    for one in (found, on_device):
        for (positions, scores), (right, highest) in zip(one, expected, strict=True):
            np.testing.assert_array_equal(positions, right)
            np.testing.assert_array_equal(scores, highest)
