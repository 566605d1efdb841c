"""What several runs say about one figure: the one shape of it in every aggregated result."""

from __future__ import annotations

from typing import TypedDict


class Estimate(TypedDict):
    """A figure over runs that differ in their seed.

    ``low`` and ``high`` bound the interval that ``interval`` names in words; both are ``mean`` for
    one run. ``std`` is the sample standard deviation, 0 for one run.
    """

    mean: float
    std: float
    min: float
    max: float
    low: float
    high: float
    num_runs: int
    interval: str
