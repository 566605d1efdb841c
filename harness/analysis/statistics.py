"""Paired comparisons, corrections and summaries. Pure: arrays in, numbers out, no clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import stats

from .estimate import Estimate

CONFIDENCE = 0.95
POWER = 0.8
NUM_RESAMPLES = 2000
INTERVAL = "95%, Student's t over seeds"
RATIO_INTERVAL = f"{INTERVAL}, of the logarithm of ratios paired by seed; the mean is geometric"
MIN_UNITS = 5
"""A bootstrap of fewer units knows too few different resamples; the t interval is given then."""


def estimate(values: Sequence[float | None]) -> Estimate | None:
    """A figure over runs, ``values`` one of each; None if a value is.

    Raises:
        ValueError: no value at all.

    """
    if not values:
        raise ValueError("an estimate from no values")
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    array = np.asarray(known, dtype=np.float64)
    mean, low, high = mean_interval(array)
    return _estimate(array, mean, low, high, INTERVAL)


def ratio_estimate(pairs: Sequence[tuple[float | None, float | None]]) -> Estimate | None:
    """The pairs' ratios, first over second; None if a value is missing or 0, or there is no pair.

    ``mean`` is geometric, and the interval that of the logarithm.
    """
    if not pairs or not all(a and b for a, b in pairs):
        return None
    ratios = np.array([a / b for a, b in pairs if a and b])
    mean, low, high = (float(np.exp(value)) for value in mean_interval(np.log(ratios)))
    return _estimate(ratios, mean, low, high, RATIO_INTERVAL)


def _estimate(values: np.ndarray, mean: float, low: float, high: float, interval: str) -> Estimate:
    return {
        "mean": mean,
        "std": float(values.std(ddof=1)) if len(values) > 1 else 0.0,
        "min": float(values.min()),
        "max": float(values.max()),
        "low": low,
        "high": high,
        "num_runs": len(values),
        "interval": interval,
    }


def disjoint(starts: Sequence[int], length: int) -> list[int]:
    """Indices of as many stretches ``[start, start + length)`` as can be without sharing a place.

    Interval scheduling, earliest first, in order of place. It looks at places alone, so what it
    leaves out depends on no result.
    """
    chosen: list[int] = []
    for index in sorted(range(len(starts)), key=starts.__getitem__):
        if not chosen or starts[index] >= starts[chosen[-1]] + length:
            chosen.append(index)
    return chosen


def paired_test(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[int] | None = None,
    neighbours: bool = False,
) -> dict[str, Any]:
    """Whether two methods differ on the same windows.

    Args:
        first, second: mean negative log-likelihood per window, ``[n]`` each, paired; of windows
            that are independent, so share no token (``disjoint``).
        clusters: seed of each window, or its group of neighbours, ``[n]``; None: all of one.
        neighbours: clusters are groups of windows that depend on each other, so that a single one
            allows no test and no interval.

    Returns:
        - ``mean_difference_nats``: ``second - first``, nats per token; positive: ``first`` is
          better;
        - ``interval_95`` and what it was made by (``interval_method``), see ``interval``;
          ``interval_95_t``, Student's, which takes all windows as independent;
        - ``paired_t_p``, ``wilcoxon_p``: two-sided paired t-test and Wilcoxon signed-rank. The
          latter is no test of the mean where differences are skewed;
        - ``clustered_t_p``: two-sided t-test over the means of the clusters, for windows that
          depend on their neighbours; ``paired_t_p`` where all are of one seed;
        - ``effect_size_dz``: Cohen's d of paired samples, mean over standard deviation;
        - ``minimal_detectable_difference``: the smallest difference that a paired t-test at 5%
          finds in 80% of samples of this size and spread, nats per token.

        None where a figure does not exist: fewer than two windows, or no difference at all.

    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise ValueError(f"paired windows of shapes {a.shape} and {b.shape}")
    groups = np.zeros(len(a), dtype=int) if clusters is None else np.asarray(clusters)
    if groups.shape != a.shape:
        raise ValueError(f"{len(groups)} clusters for {len(a)} windows")
    difference = b - a
    n = len(difference)
    result: dict[str, Any] = {
        "num_windows": n,
        "num_seeds": len(np.unique(groups)),
        "mean_difference_nats": float(difference.mean()),
        "interval_95": None,
        "interval_method": None,
        "interval_95_t": None,
        "paired_t_p": None,
        "clustered_t_p": None,
        "wilcoxon_p": None,
        "effect_size_dz": None,
        "minimal_detectable_difference": None,
    }
    if n < 2 or not np.any(difference != 0):
        return result
    result["wilcoxon_p"] = float(stats.wilcoxon(difference).pvalue)
    spread = float(difference.std(ddof=1))
    # Rounding leaves a spread of some 1e-17 where every difference is the same.
    if spread > 1e-12 * abs(difference).max():
        result["paired_t_p"] = float(stats.ttest_rel(b, a).pvalue)
        result["clustered_t_p"] = result["paired_t_p"]
        if neighbours or result["num_seeds"] > 1:
            result["clustered_t_p"] = _clustered_t(difference, groups)
        result["effect_size_dz"] = float(difference.mean()) / spread
        quantiles = stats.t.ppf([0.5 + CONFIDENCE / 2, POWER], n - 1).sum()
        result["minimal_detectable_difference"] = float(quantiles * spread / math.sqrt(n))
        result["interval_95_t"] = list(mean_interval(difference)[1:])
        if not neighbours or result["num_seeds"] >= MIN_UNITS:
            low, high, method = interval(difference, groups)
        elif result["num_seeds"] > 1:
            low, high, method = _over_clusters(difference, groups)
        else:
            return result
        result["interval_95"], result["interval_method"] = [low, high], method
    return result


def _cluster_means(difference: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    return np.array([difference[clusters == name].mean() for name in np.unique(clusters)])


def _clustered_t(difference: np.ndarray, clusters: np.ndarray) -> float | None:
    """None: a single cluster, or no spread between them."""
    means = _cluster_means(difference, clusters)
    if len(means) < 2 or means.std(ddof=1) <= 1e-12 * abs(means).max():
        return None
    return float(stats.ttest_1samp(means, 0.0).pvalue)


def _over_clusters(difference: np.ndarray, clusters: np.ndarray) -> tuple[float, float, str]:
    """Student's t over the means of few clusters, of which a bootstrap knows too little."""
    _, low, high = mean_interval(_cluster_means(difference, clusters))
    return low, high, "Student's t over clusters"


def interval(difference: np.ndarray, clusters: np.ndarray) -> tuple[float, float, str]:
    """95% interval of a mean difference, and the method's name.

    Several seeds: studentised bootstrap that resamples seeds, then windows within them, around
    the seeds' means (bootstrap-t over clusters: Davison & Hinkley 1997, 3.8; Cameron, Gelbach &
    Miller 2008). The plain percentile interval is far too short for a handful of seeds. One
    seed: the same over windows. Fewer than ``MIN_UNITS`` windows: Student's t.

    Args:
        difference: ``[n]``, ``n`` at least 2.
        clusters: seed of each, ``[n]``.

    """
    names, index, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    n = len(difference)
    if n < MIN_UNITS:
        _, low, high = mean_interval(difference)
        return low, high, "Student's t"
    if len(names) > 1 and sizes.min() >= 2:
        grouped = difference[np.argsort(index, kind="stable")]
        units = np.add.reduceat(grouped, np.cumsum(sizes) - sizes) / sizes
        drawn = (_cluster_weights(tuple(sizes.tolist())) @ grouped).reshape(NUM_RESAMPLES, -1)
        method = "bootstrap-t over seeds and windows"
    else:
        units = difference
        drawn = difference[_window_draws(n)]
        method = "bootstrap-t over windows"
    with np.errstate(divide="ignore", invalid="ignore"):
        t = (drawn.mean(axis=1) - units.mean()) / _standard_error(drawn)
    low, high = np.quantile(t[np.isfinite(t)], [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    centre, error = units.mean(), _standard_error(units)
    return float(centre - high * error), float(centre - low * error), method


def _standard_error(values: np.ndarray) -> np.ndarray:
    """Standard error of the mean along the last axis."""
    return values.std(axis=-1, ddof=1) / math.sqrt(values.shape[-1])


@lru_cache(maxsize=4)
def _window_draws(n: int) -> np.ndarray:
    """Resamples of ``n`` windows, the same at every call, ``[NUM_RESAMPLES, n]``."""
    return np.random.default_rng(0).integers(0, n, size=(NUM_RESAMPLES, n))


@lru_cache(maxsize=2)
def _cluster_weights(sizes: tuple[int, ...]) -> np.ndarray:
    """Resamples of clusters, then of windows within them, as weights of the windows.

    A row gives one drawn cluster's mean, ``len(sizes)`` rows make a resample:
    ``[NUM_RESAMPLES * len(sizes), sum(sizes)]``, the same at every call.
    """
    rng = np.random.default_rng(0)
    picked = rng.integers(0, len(sizes), size=NUM_RESAMPLES * len(sizes))
    starts = np.cumsum(sizes) - np.asarray(sizes)
    weights = np.zeros((len(picked), sum(sizes)))
    for cluster, size in enumerate(sizes):
        rows = np.flatnonzero(picked == cluster)
        counts = rng.multinomial(size, np.full(size, 1 / size), size=len(rows))
        weights[rows, starts[cluster] : starts[cluster] + size] = counts / size
    return weights


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of ``values`` ``[n]`` and its 95% t interval; the mean thrice for one value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, mean, mean
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    margin = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)) * error
    return mean, mean - margin, mean + margin


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment over a family (Holm 1979); None stays and does not count."""
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        adjusted[i] = largest
    return adjusted
