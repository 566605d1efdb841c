"""What one side costs beside another, as a change of perplexity with its interval. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

AFTER_EVICTION = "after_eviction"


class Interval(NamedTuple):
    """A figure and its 95% interval; the bounds are None where there is none."""

    value: float
    low: float | None
    high: float | None


def change_of(result: Mapping[str, Any] | None) -> Interval | None:
    """A test's result (``statistics.paired_test``) as a share of perplexity: -0.05 is 5% less than
    the other side's. None of no result."""
    if result is None:
        return None
    low, high = result["interval_95"] or (None, None)
    return Interval(math.expm1(result["mean_difference_nats"]), _share(low), _share(high))


def _share(nats: float | None) -> float | None:
    return None if nats is None else math.expm1(nats)
