import numpy as np
import pytest

from anysplade.data.near_duplicates import near_duplicates, signature


def test_the_share_of_equal_runs_decides():
    """Of pairs of texts of 200 words that share a part, those above a Jaccard similarity of 0.85 and none below 0.5 are found."""
    generator = np.random.default_rng(0)
    texts = generator.integers(0, 10**6, (60, 200))
    for shared, expected in ((190, 60), (110, 0)):
        others = np.concatenate([texts[:, :shared], generator.integers(0, 10**6, (60, 200 - shared))], axis=1)
        both = [" ".join(map(str, text)) for text in (*texts, *others)]
        signatures = np.stack([signature(text) for text in both])
        # Of 198 runs of three words in a text, all that lie within the shared part are the same.
        similarity = (shared - 2) / (2 * 198 - (shared - 2))
        assert (signatures[:60] == signatures[60:]).mean() == pytest.approx(similarity, abs=0.03)
        duplicate = near_duplicates(signatures.tobytes())
        assert (duplicate[:60].sum(), duplicate[60:].sum()) == (0, expected)
