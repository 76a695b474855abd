import numpy as np
import pytest
from scipy import stats

from anysplade.evaluation.significance import bootstrap_interval, crossed_t, holm, paired_p, paired_t, verdict


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


@pytest.mark.parametrize(
    "difference, interval, p, expected",
    [
        (0.1, (0.01, 0.2), 0.04, "better"),
        (-0.1, (-0.2, -0.01), 0.04, "worse"),
        (0.1, (0.01, 0.2), 0.05, "no difference shown"),
        (0.1, (0.0, 0.2), 0.04, "no difference shown"),  # both must show it
        (-0.1, (-0.2, 0.01), 0.001, "no difference shown"),
        (0.1, None, 0.04, "better"),
        (-0.1, None, 0.04, "worse"),
        (0.1, None, 0.5, "no difference shown"),
        (0.0, (0.0, 0.0), 1.0, "no difference shown"),
        (np.nan, (np.nan, np.nan), np.nan, "no difference shown"),
    ],
)
def test_verdicts(difference, interval, p, expected):
    assert verdict(difference, interval, p) == expected


def test_a_paired_t_test_as_scipy_has_it():
    before, after = np.random.default_rng(0).normal(size=(2, 12))
    expected = stats.ttest_rel(after, before)
    found = paired_t(before, after)
    assert (found.difference, found.p) == pytest.approx((np.mean(after - before), expected.pvalue))
    assert found.interval == pytest.approx(expected.confidence_interval(0.95))
    assert paired_t(before, before) == (0, (0, 0), 1)
    assert paired_t(np.zeros(3), np.full(3, 0.5)) == (0.5, None, 0.25)


def test_seeds_and_queries_by_hand():
    """Two seeds and three queries.

    The means of the seeds are 8 / 3 and 4 / 3, those of the queries 4, 3 / 2 and 1 / 2, and that of all is 2. So
    S = 3 * (2 / 3)² * 2 / 1 = 8 / 3, Q = 2 * (4 + 1 / 4 + 9 / 4) / 2 = 13 / 2, and E = 2 * (1 / 9 + 1 / 36 + 1 / 36) / 2 = 1 / 6.
    """
    found = crossed_t(np.array([[5, 2, 1], [3, 1, 0]]))
    square = 8 / 3 + 13 / 2 - 1 / 6
    freedom = square**2 / ((8 / 3) ** 2 / 1 + (13 / 2) ** 2 / 2 + (1 / 6) ** 2 / 2)
    error = (square / 6) ** 0.5
    assert found.difference == pytest.approx(2)
    assert found.p == pytest.approx(2 * stats.t.sf(2 / error, freedom))
    assert found.interval == pytest.approx(stats.t.interval(0.95, freedom, 2, error))


def test_seeds_that_do_not_differ_leave_the_test_over_queries():
    differences = np.random.default_rng(0).normal(size=50)
    found = crossed_t(np.array([differences, differences, differences]))
    expected = paired_t(np.zeros(50), differences)
    assert (found.difference, found.p, *found.interval) == pytest.approx((expected.difference, expected.p, *expected.interval))
    assert crossed_t(np.full((3, 4), 0.5)) == (0.5, None, 0.125)
    assert crossed_t(np.zeros((3, 4))) == (0, (0, 0), 1)


@pytest.mark.parametrize("of_seeds, of_queries, of_rest", [(0.0, 0.0, 1.0), (1.0, 0.2, 0.5), (0.1, 1.0, 0.5), (0.3, 1.0, 0.0)])
def test_without_an_effect_seeds_and_queries_show_none(of_seeds, of_queries, of_rest):
    """About one in twenty is shown, where a test over the queries of the mean shows far more if seeds differ."""
    generator, shown, over_queries = np.random.default_rng(1), 0, 0
    for _ in range(200):
        differences = (
            of_seeds * generator.normal(size=(3, 1))
            + of_queries * generator.normal(size=(1, 40))
            + of_rest * generator.normal(size=(3, 40))
        )
        shown += verdict(*crossed_t(differences)) != "no difference shown"
        over_queries += verdict(*paired_t(np.zeros(40), differences.mean(axis=0))) != "no difference shown"
    assert shown <= 18
    if of_seeds >= 0.3:
        assert over_queries > 25
