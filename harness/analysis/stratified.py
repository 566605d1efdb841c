"""A mean over strata that count alike, its interval, and whether it is 0. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from .statistics import CONFIDENCE


def stratified_test(strata: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The mean of paired differences over tasks, each of which counts alike.

    A paired t-test, stratified by task: the standard error comes from the spread within each
    task, the degrees of freedom are Welch's and Satterthwaite's (Satterthwaite 1946). Of one task
    it is the plain paired t-test.

    Args:
        strata: differences of each task's samples, ``[n_t]`` each, independent of each other.

    Returns:
        ``mean_difference``, ``interval_95_t``, ``paired_t_p``, ``num_samples``, ``num_tasks``.
        Interval and p are None where they do not exist: fewer than two samples of a task, or no
        spread at all.

    Raises:
        ValueError: no task, or one without samples.

    """
    if not strata or not all(len(values) for values in strata):
        raise ValueError("a mean over tasks without samples")
    arrays = [np.asarray(values, dtype=np.float64) for values in strata]
    mean = float(np.mean([values.mean() for values in arrays]))
    result: dict[str, Any] = {
        "mean_difference": mean,
        "interval_95_t": None,
        "paired_t_p": None,
        "num_samples": sum(map(len, arrays)),
        "num_tasks": len(arrays),
    }
    if min(map(len, arrays)) < 2:
        return result
    parts = np.array([v.var(ddof=1) / len(v) for v in arrays]) / len(arrays) ** 2
    error = math.sqrt(parts.sum())
    # Rounding leaves a spread of some 1e-17 where every difference is the same.
    if error > 1e-12 * max(float(abs(v).max()) for v in arrays) and error > 0:
        freedom = parts.sum() ** 2 / sum(
            part**2 / (len(v) - 1) for part, v in zip(parts, arrays, strict=True)
        )
        margin = float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom)) * error
        result["interval_95_t"] = [mean - margin, mean + margin]
        result["paired_t_p"] = float(2 * stats.t.sf(abs(mean) / error, freedom))
    return result
