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

    def is_at_most(self, limit: float) -> bool | None:
        """Whether the whole interval lies within ``limit``; False: wholly beyond it. None: neither,
        or there is no interval."""
        if self.low is None or self.high is None:
            return None
        return True if self.high <= limit else False if self.low > limit else None

    def is_at_least(self, limit: float) -> bool | None:
        """The same of a limit from below."""
        if self.low is None or self.high is None:
            return None
        return True if self.low >= limit else False if self.high < limit else None


def change_of(result: Mapping[str, Any] | None, interval: str = "interval_95") -> Interval | None:
    """A test's result (``statistics.paired_test``), with one of its intervals, as a share of
    perplexity: -0.05 is 5% less than the other side's. None of no result."""
    if result is None:
        return None
    low, high = result[interval] or (None, None)
    return Interval(math.expm1(result["mean_difference_nats"]), _share(low), _share(high))


def _share(nats: float | None) -> float | None:
    return None if nats is None else math.expm1(nats)
