"""When requests are sent: from a seed, no clock. Pure."""

from __future__ import annotations

import math

import numpy as np

from ..errors import UsageError

WITH_RATE = ("poisson", "gamma", "constant", "ramp")
PROCESSES = (*WITH_RATE, "closed", "trace")


def gamma(
    num_requests: int, rate: float, burstiness: float, rng: np.random.Generator
) -> np.ndarray:
    """Arrivals with gamma-distributed gaps; the first one at 0.

    Args:
        num_requests: n.
        rate: requests per second; ``inf`` sends everything at once.
        burstiness: shape of the gaps, as in ``vllm bench serve``: 1 is a Poisson process, below 1
            is burstier, above 1 is more even. The mean gap is ``1 / rate`` whatever the shape.
        rng: of the gaps.

    Returns:
        Seconds from the start of the run, float ``[n]``, non-decreasing.

    """
    if math.isinf(rate):
        return np.zeros(num_requests)
    return _from_gaps(rng.gamma(burstiness, 1.0 / (rate * burstiness), size=num_requests))


def poisson(num_requests: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Arrivals of a Poisson process, ``[n]`` seconds; the first one at 0."""
    return gamma(num_requests, rate, 1.0, rng)


def constant(num_requests: int, rate: float) -> np.ndarray:
    """Arrivals every ``1 / rate`` seconds, ``[n]``."""
    return np.arange(num_requests) / rate


def ramp(
    num_requests: int, start_rate: float, end_rate: float, rng: np.random.Generator
) -> np.ndarray:
    """A Poisson process whose rate grows (or falls) linearly, ``[n]`` seconds.

    The rate moves from ``start_rate`` to ``end_rate`` over the ``2 n / (start + end)`` seconds
    that n requests take on average, and stays there. Arrivals of a unit-rate process are mapped
    through the inverse of the cumulative rate.
    """
    duration = 2.0 * num_requests / (start_rate + end_rate)
    slope = (end_rate - start_rate) / duration
    unit = _from_gaps(rng.exponential(size=num_requests))
    if slope == 0:
        return unit / start_rate
    ramped = np.minimum(unit, num_requests)
    times = (np.sqrt(start_rate**2 + 2 * slope * ramped) - start_rate) / slope
    return times + (unit - ramped) / end_rate


def requests_within(
    process: str, duration_s: float, rate: float, end_rate: float | None = None
) -> int:
    """How many requests an open loop sends in ``duration_s`` seconds on average, rounded.

    Raises:
        UsageError: the process has no rate to take them from, or they are none.

    """
    if process in ("closed", "trace"):
        raise UsageError(
            f"--arrivals {process} has no rate that a --duration would make a number of requests "
            "of; give --num-requests"
        )
    if not 0 < duration_s < math.inf:
        raise UsageError(f"--duration is {duration_s:g}; give a number of seconds above 0")
    mean = _mean_rate(process, rate, end_rate)
    if not 0 < mean < math.inf:
        raise UsageError(f"--duration needs a finite --request-rate above 0, not {mean:g}")
    count = round(mean * duration_s)
    if not count:
        raise UsageError(
            f"--duration {duration_s:g} at {mean:g} requests per second is no request; raise it"
        )
    return count


def send_times(
    process: str,
    num_requests: int,
    rate: float,
    *,
    burstiness: float = 1.0,
    end_rate: float | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Intended send times of an open loop, ``[n]`` seconds.

    Raises:
        UsageError: a rate or the burstiness is out of range.

    """
    # A tiny rate or shape takes sums out of what floats hold: the check below says so.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        times = _send_times(process, num_requests, rate, burstiness, end_rate, seed)
    if not np.all(np.isfinite(times)):
        raise UsageError(
            f"--arrivals {process} at these rates give times that are no numbers; raise "
            "--request-rate, --ramp-to or --burstiness"
        )
    return times


def _send_times(
    process: str,
    num_requests: int,
    rate: float,
    burstiness: float,
    end_rate: float | None,
    seed: int,
) -> np.ndarray:
    for name, value in (("--request-rate", rate), ("--burstiness", burstiness)):
        if not value > 0 or (name == "--burstiness" and math.isinf(value)):
            raise UsageError(f"{name} is {value:g}; give a number above 0")
    rng = np.random.default_rng([seed, 0])
    if process == "poisson":
        return poisson(num_requests, rate, rng)
    if process == "gamma":
        return gamma(num_requests, rate, burstiness, rng)
    if math.isinf(rate):
        raise UsageError(f"--arrivals {process} needs a finite --request-rate")
    if process == "constant":
        return constant(num_requests, rate)
    if end_rate is None or not 0 < end_rate < math.inf:
        raise UsageError("--arrivals ramp needs --ramp-to, a finite rate above 0")
    return ramp(num_requests, rate, end_rate, rng)


def _mean_rate(process: str, rate: float, end_rate: float | None) -> float:
    return (rate + end_rate) / 2 if process == "ramp" and end_rate is not None else rate


def _from_gaps(gaps: np.ndarray) -> np.ndarray:
    times = np.cumsum(gaps)
    return times - times[0] if len(times) else times
