import pytest

from anysplade.search.fusion import fuse

FIRST, SECOND = {"a": 9.0, "b": 5.0, "c": 1.0}, {"c": 0.4, "d": 0.2}


def test_reciprocal_rank_fusion():
    expected = {"c": 1 / 63 + 1 / 61, "a": 1 / 61, "b": 1 / 62, "d": 1 / 62}
    fused = fuse([FIRST, SECOND], "rrf")
    assert fused == pytest.approx(expected)
    assert list(fused) == ["c", "a", "b", "d"]


def test_the_mean_of_scaled_scores():
    fused = fuse([FIRST, SECOND], "wsum")
    assert fused == pytest.approx({"a": 0.5, "c": 0.5, "b": 0.25, "d": 0.0})
    assert list(fused) == ["a", "c", "b", "d"]


@pytest.mark.parametrize("method", ["rrf", "wsum"])
def test_rankings_without_hits_or_with_one(method):
    assert fuse([], method) == fuse([{}, {}], method) == {}
    assert list(fuse([{}, {"a": 0.1}], method)) == ["a"]
