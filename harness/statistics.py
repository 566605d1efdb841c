"""Paired comparisons and summaries. Pure: arrays in, numbers out, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats


def summary(values: Sequence[float | None]) -> dict[str, float] | None:
    """Mean, sample standard deviation (0 for one value), min and max; None if a value is."""
    if not values:
        raise ValueError("a summary of no values")
    if any(value is None for value in values):
        return None
    array = np.asarray(values, dtype=np.float64)
    return {
        "mean": float(array.mean()),
        "std": float(array.std(ddof=1)) if len(array) > 1 else 0.0,
        "min": float(array.min()),
        "max": float(array.max()),
    }


def paired_test(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """Whether two methods differ on the same windows.

    Args:
        first, second: mean negative log-likelihood per window, ``[n]`` each, paired.

    Returns:
        Paired t-test and Wilcoxon signed-rank test (two-sided), the mean difference
        (``second - first``, nats per token: positive = ``first`` is better) with a 95% interval
        from the t distribution. p-values are None where they do not exist: fewer than two
        windows, or no difference at all.

    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise ValueError(f"paired windows of shapes {a.shape} and {b.shape}")
    difference = b - a
    result: dict[str, Any] = {
        "num_windows": len(a),
        "mean_difference_nats": float(difference.mean()),
        "interval_95": None,
        "paired_t_p": None,
        "wilcoxon_p": None,
    }
    if len(a) > 1 and np.any(difference != 0):
        error = difference.std(ddof=1) / np.sqrt(len(a))
        margin = stats.t.ppf(0.975, len(a) - 1) * error
        result["interval_95"] = [
            float(difference.mean() - margin),
            float(difference.mean() + margin),
        ]
        if error > 0:
            result["paired_t_p"] = float(stats.ttest_rel(b, a).pvalue)
        result["wilcoxon_p"] = float(stats.wilcoxon(difference).pvalue)
    return result
