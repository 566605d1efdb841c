"""Service-level objectives: per request (goodput) and per run (percentiles). Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import UsageError

LATENCIES = (
    "time_to_first_token_ms",
    "time_per_output_token_ms",
    "inter_token_latency_ms",
    "end_to_end_latency_ms",
)
PERCENTILES = (50, 90, 95, 99)
_PER_REQUEST = tuple(name for name in LATENCIES if name != "inter_token_latency_ms")


def parse_slo(given: Iterable[Any] | Mapping[Any, Any]) -> dict[str, float]:
    """``["time_to_first_token_ms:2000"]``, or the same as a mapping, to ``{name: milliseconds}``.

    Raises:
        UsageError: not NAME:MILLISECONDS with a known name and a finite limit, or one name twice.

    """
    texts = [f"{n}:{v}" for n, v in given.items()] if isinstance(given, Mapping) else given
    objectives: dict[str, float] = {}
    for text in map(str, texts):
        name, _, value = text.partition(":")
        try:
            limit = float(value)
        except ValueError:
            limit = math.nan
        if name not in _PER_REQUEST or not _is_limit(limit):
            raise UsageError(
                f"--slo {text!r}; give NAME:MILLISECONDS with one of: {', '.join(_PER_REQUEST)}"
            )
        if name in objectives:
            raise UsageError(f"--slo names {name} twice; keep one")
        objectives[name] = limit
    return objectives


def _is_limit(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def is_good(request: Mapping[str, float | None], objectives: Mapping[str, float]) -> bool:
    """Whether a succeeded request meets every objective.

    A latency that does not exist (one output token has no time per output token) cannot miss.
    """
    return all(
        (value := request[name]) is None or value <= limit for name, limit in objectives.items()
    )


def check_run_slo(slo: Mapping[str, Any]) -> None:
    """Refuse a run's objectives unless they read ``{latency: {"p99": milliseconds}}``.

    Raises:
        UsageError: the first that does not.

    """
    for name, limits in slo.items():
        if name not in LATENCIES:
            raise UsageError(f"slo names {name!r}; use one of: {', '.join(LATENCIES)}")
        if not isinstance(limits, Mapping) or not limits:
            raise UsageError(f"slo {name} is {limits!r}; give percentiles like {{p99: 2000}}")
        for statistic, limit in limits.items():
            known = [f"p{p}" for p in PERCENTILES] + ["mean"]
            if statistic not in known or not _is_limit(limit):
                raise UsageError(
                    f"slo {name} has {statistic}: {limit!r}; give milliseconds for one of: "
                    f"{', '.join(known)}"
                )


def holds(summary: Mapping[str, Any], slo: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether a run's summary keeps every objective; a latency without values does not.

    Failed, timed-out or incomplete requests break it too: a server that drops requests must not
    look fast.
    """
    if any(summary["counts"][kind] for kind in ("failed", "timed_out", "incomplete", "not_sent")):
        return False
    for name, limits in slo.items():
        distribution = summary[name]
        if distribution is None:
            return False
        if any(distribution[statistic] > limit for statistic, limit in limits.items()):
            return False
    return True
