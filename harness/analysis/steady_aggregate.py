"""From records of steady loads to figures of a method, over seeds. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from .roofline import least_ms_per_step
from .statistics import estimate

_MANY_PARTS = 12
"""A minute's."""
STEADY_METRICS = ("ms_per_step", "tokens_per_step", "running", "kv_blocks_used")


def steady_figures(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of the runs of one method and budget, one of each seed.

    Returns:
        An estimate of each of ``STEADY_METRICS``; ``kv_blocks`` of the pool;
        ``sub_windows_of_mean``, the slowest and the fastest part of a window against the whole;
        ``last_third``, output tokens per second of a window's, where it takes a minute;
        ``decision_ms_per_step``, the scheduler's time for decisions; ``split``, milliseconds per
        profiled step by class of kernel, on average over the runs; ``host``, the like by what the
        core's thread works at; ``roofline_ms_per_step``. These three and ``last_third`` are None
        where there are none.

    """
    decided = [1e3 * run.get("decision_seconds", 0.0) / run["steps"] for run in runs]
    parts = [p / run["output_tokens_per_second"] for run in runs for p in run["sub_windows"]]
    return {
        **{metric: estimate([run[metric] for run in runs]) for metric in STEADY_METRICS},
        "kv_blocks": runs[0]["kv_blocks"],
        "sub_windows_of_mean": [min(parts), max(parts)],
        "last_third": last_third(runs),
        "decision_ms_per_step": fmean(decided),
        "split": _means([run["split"] for run in runs]),
        "host": _means([run.get("host") for run in runs]),
        "roofline_ms_per_step": least_ms_per_step(runs[0]),
    }


def _means(parts: Sequence[Mapping[str, float] | None]) -> dict[str, float] | None:
    """Part by part; None where a run has none, as older ones have not."""
    known = [part for part in parts if part]
    if len(known) < len(parts):
        return None
    return {name: fmean(part[name] for part in known) for name in known[0]}


def last_third(runs: Sequence[Mapping[str, Any]]) -> float | None:
    """See ``steady_figures``."""
    windows = [run["sub_windows"] for run in runs]
    if any(len(parts) < _MANY_PARTS for parts in windows):
        return None
    return fmean(fmean(parts[-(len(parts) // 3) :]) for parts in windows)
