"""Means over strata that count alike: of differences, and what one is of another. Pure."""

from __future__ import annotations

import math
import warnings
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


def stratified_ratio(strata: Sequence[tuple[Sequence[float], Sequence[float]]]) -> dict[str, Any]:
    """What the mean over tasks of one method is of another's, every task counted alike.

    The interval is a percentile bootstrap that resamples the pairs of each task for itself.

    Args:
        strata: of each task the scores of both methods on the same samples, the first one below.

    Returns:
        ``ratio``, None where the first method's mean is 0, and ``interval_95``, None where it does
        not exist: fewer than two samples of a task, or resamples in which that mean is 0.

    Raises:
        ValueError: no task, or one without samples.

    """
    if not strata or not all(len(first) == len(second) > 0 for first, second in strata):
        raise ValueError("a ratio over tasks without samples")
    scores = np.array([np.concatenate(pair) for pair in zip(*strata, strict=True)], np.float64)
    stops = np.cumsum([len(first) for first, _ in strata])
    places = [np.arange(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]

    def ratio(*drawn: Any, axis: int = -1) -> Any:
        first, second = (sum(method[place].mean(axis) for place in drawn) for method in scores)
        return second / first

    result: dict[str, Any] = {"ratio": None, "interval_95": None}
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = float(ratio(*places))
        if not math.isfinite(found):
            return result
        result["ratio"] = found
        if min(map(len, places)) < 2:
            return result
        made = stats.bootstrap(
            places,
            ratio,
            confidence_level=CONFIDENCE,
            method="percentile",
            batch=500,
            vectorized=True,
            rng=0,
        )
    if np.isfinite(made.bootstrap_distribution).all():
        result["interval_95"] = [float(bound) for bound in made.confidence_interval]
    return result
