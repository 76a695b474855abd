"""Tests and intervals for paired differences."""

from collections.abc import Sequence

import numpy as np
from scipy import stats

SIGNIFICANT = 0.05  # corrected p below which a difference counts
TIE = 1e-9  # a smaller difference is rounding
_RESAMPLES = 2000  # of the bootstrap


def paired_p(before: np.ndarray, after: np.ndarray) -> float:
    """Two-sided p of a paired t-test.

    The test needs differences that vary. If all are the same, a sign-flip test replaces it: p is the probability 2 / 2^n that
    n fair coins all show the same side, which is 1 for a single query. Without any difference p is 1.
    """
    difference = after - before
    if np.abs(difference).max(initial=0.0) < TIE:
        return 1.0
    p = 2.0 ** (1 - len(difference)) if np.ptp(difference) < TIE else float(stats.ttest_rel(after, before).pvalue)
    return max(p, float(np.finfo(float).tiny))  # a p of 0 is rounding; no test gives it


def bootstrap_interval(values: np.ndarray) -> tuple[float, float] | None:
    """95 % bootstrap interval of the mean (percentiles, 2,000 resamples, seed 0).

    None if all values are the same but not 0, as they do not show how much they vary; (0, 0) if all are 0.
    """
    if np.ptp(values) < TIE:
        return None if np.abs(values).max() > TIE else (0.0, 0.0)
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=_RESAMPLES, method="percentile", rng=np.random.default_rng(0), batch=100
    ).confidence_interval
    return float(found.low), float(found.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the p of rank i among m, counted from 0, is multiplied by m - i, and corrected values do not
    fall with the rank. NaN stays NaN and does not count in m."""
    p = np.array(p_values, float)
    ranked = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]  # NaN is last
    p[ranked] = np.minimum(1, np.maximum.accumulate(p[ranked] * np.arange(len(ranked), 0, -1)))
    return p.tolist()
