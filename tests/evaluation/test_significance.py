import numpy as np
import pytest
from scipy import stats

from anysplade.evaluation.significance import bootstrap_interval, holm, paired_p


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_interval_by_hand():
    """The mean of a hundred fair coins has a standard error of 0.5 / √100, and 95 % of a normal distribution lie within 1.96."""
    low, high = bootstrap_interval(np.repeat([0.0, 1.0], 50))
    assert (low, high) == (pytest.approx(0.5 - 1.96 * 0.05, abs=0.006), pytest.approx(0.5 + 1.96 * 0.05, abs=0.006))


def test_intervals_cover():
    """The mean of a skewed sample lies in its 95 % interval about as often as it says."""
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        low, high = bootstrap_interval(generator.exponential(1.0, 100))
        covered += low <= 1 <= high
    assert 85 <= covered <= 100


@pytest.mark.parametrize(
    "difference, expected",
    [
        ([0.5], 1),
        ([0.5, 0.5], 0.5),
        ([-0.5, -0.5], 0.5),
        ([0.1 + 0.2, 0.3, 0.3], 0.25),  # the same up to rounding
        ([0.5] * 60, 2**-59),
        ([0.5] * 5000, np.finfo(float).tiny),  # 2^-4999 is 0 in floating point
        ([0, 0], 1),
        ([0], 1),
        ([], 1),
        ([0.5, 0], stats.ttest_1samp([0.5, 0], 0).pvalue),
        ([0.5, 0.4, 0.6], stats.ttest_1samp([0.5, 0.4, 0.6], 0).pvalue),
        ([0.5, np.nan], np.nan),
    ],
)
def test_p_of_differences(difference, expected):
    after = np.array(difference, float)
    assert paired_p(np.zeros(len(after)), after) == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_a_p_that_is_no_number_does_not_touch_the_others():
    assert holm([np.nan, 0.01, 0.04]) == pytest.approx([np.nan, 0.02, 0.04], nan_ok=True)


@pytest.mark.parametrize("values, expected", [([0.5], None), ([0.5, 0.5, 0.5], None), ([0.0], (0, 0)), ([0.0, 0.0], (0, 0))])
def test_values_that_are_all_the_same_have_no_interval(values, expected):
    assert bootstrap_interval(np.array(values)) == expected
