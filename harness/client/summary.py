"""From raw results to the figures of a run. Pure: no clock, no HTTP."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .load_plan import LOAD
from .result import STATUSES, SUCCEEDED, Result
from .slo import PERCENTILES, is_good

TIMELINE_BIN_S = 0.5


def distribution(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, sample standard deviation, percentiles (linear interpolation), min, max and count.

    None for no values: there is no such thing as the latency of nothing. The deviation of a
    single value is None.
    """
    if not len(values):
        return None
    array = np.asarray(values, dtype=np.float64)
    result: dict[str, Any] = {
        "count": len(array),
        "mean": float(array.mean()),
        "std": float(array.std(ddof=1)) if len(array) > 1 else None,
        "min": float(array.min()),
        "max": float(array.max()),
    }
    points = np.percentile(array, PERCENTILES)
    return result | {f"p{p}": float(v) for p, v in zip(PERCENTILES, points, strict=True)}


def latencies(result: Result, open_loop: bool) -> dict[str, float | None]:
    """Latencies of one succeeded request, ms.

    In an open loop they count from the intended send time: a client or server that falls behind
    cannot hide it (no coordinated omission). ``time_per_output_token_ms`` is over the tokens
    after the first, None for a single token or where their number is unknown. Definitions as in
    ``vllm bench serve``.
    """
    start = result.start(open_loop)
    first, last = result.chunks[0], result.chunks[-1]
    rest = (result.output_tokens or 0) - 1
    return {
        "time_to_first_token_ms": 1000 * (first - start),
        "time_per_output_token_ms": 1000 * (last - first) / rest if rest > 0 else None,
        "end_to_end_latency_ms": 1000 * (last - start),
    }


def summarize(
    results: Sequence[Result],
    members: Sequence[Result],
    span: tuple[float, float],
    open_loop: bool,
    objectives: Mapping[str, float],
) -> dict[str, Any]:
    """Figures of a stretch of the run.

    Args:
        results: everything. Throughputs count what *happened* within the span, whichever request
            it belongs to: completions, and tokens at the time their chunk arrived (None where
            the server did not count them, as is a goodput that depends on their number).
        members: the requests that counts and latencies are over. Latencies are of streamed load
            requests; the quality requests have counts of their own.
        span: first and last second.
        open_loop: latencies count from the intended send time.
        objectives: per-request objectives of the goodput.

    """
    low, high = span
    load = [r for r in members if r.kind == LOAD]
    succeeded = [r for r in load if r.status == SUCCEEDED]
    measured = [latencies(r, open_loop) for r in succeeded]
    gaps = [1000 * gap for r in succeeded for gap in np.diff(r.chunks)]
    seconds = high - low
    completed = sum(
        r.status == SUCCEEDED and r.end is not None and low <= r.end <= high for r in results
    )
    judged = bool(objectives) and (
        "time_per_output_token_ms" not in objectives
        or all(r.output_tokens is not None for r in succeeded)
    )
    good = sum(is_good(request, objectives) for request in measured)
    summary: dict[str, Any] = {
        "span_s": [low, high],
        "counts": counts(load),
        "quality_counts": counts([r for r in members if r.kind != LOAD]),
    }
    for name in ("time_to_first_token_ms", "time_per_output_token_ms", "end_to_end_latency_ms"):
        summary[name] = distribution([v for m in measured if (v := m[name]) is not None])
    summary["inter_token_latency_ms"] = distribution(gaps)
    summary["send_lag_ms"] = distribution(
        [
            1000 * (r.sent - r.intended)
            for r in load
            if r.sent is not None and r.intended is not None
        ]
    )
    if seconds > 0:
        tokens = token_timeline(results, np.array([low, high]))
        summary |= {
            "request_throughput": completed / seconds,
            "output_throughput": None if tokens is None else float(tokens[0]) / seconds,
            "goodput": good / seconds if judged else None,
            "good_share": good / len(load) if judged and load else None,
        }
    else:
        summary |= dict.fromkeys(
            ("request_throughput", "output_throughput", "goodput", "good_share")
        )
    summary["peak_concurrency"] = peak_concurrency(members)
    return summary


def members_of(results: Sequence[Result], span: tuple[float, float]) -> list[Result]:
    """Requests whose start (intended, in a closed loop actual) lies in the span."""
    starts = [r.intended if r.intended is not None else r.sent for r in results]
    return [
        r
        for r, start in zip(results, starts, strict=True)
        if start is not None and span[0] <= start <= span[1]
    ]


def spans(
    results: Sequence[Result], warm_up_s: float, cool_down_s: float
) -> dict[str, tuple[float, float]]:
    """``all`` (0 to the last end) and ``steady``.

    ``steady`` begins ``warm_up_s`` after the start. With a ``cool_down_s`` it ends that long
    before the last sending, so that the draining of the queue is not in it; without, with the
    run. Empty where nothing is left.
    """
    ends = [r.end for r in results if r.end is not None]
    sent = [r.sent for r in results if r.sent is not None]
    last = max(ends, default=0.0)
    steady_end = max(0.0, max(sent, default=0.0) - cool_down_s) if cool_down_s else last
    return {"all": (0.0, last), "steady": (min(warm_up_s, steady_end), steady_end)}


def peak_concurrency(results: Sequence[Result]) -> int:
    """The most requests in flight at one moment (sent and not ended)."""
    edges = [(r.sent, 1) for r in results if r.sent is not None and r.end is not None]
    edges += [(r.end, -1) for r in results if r.sent is not None and r.end is not None]
    running = peak = 0
    for _, change in sorted(edges):  # an end at the moment of a start comes first
        running += change
        peak = max(peak, running)
    return peak


def token_timeline(results: Sequence[Result], edges: np.ndarray) -> np.ndarray | None:
    """Output tokens that arrived between consecutive ``edges`` (seconds), float ``[n - 1]``.

    A request's tokens are shared out evenly over its chunks. Those of incomplete requests count:
    the server made them. None where the server did not count the tokens of some request.
    """
    if unknown_tokens(results):
        return None
    streamed = [r for r in results if r.chunks]
    if not streamed:
        return np.zeros(len(edges) - 1)
    times = [np.asarray(r.chunks) for r in streamed]
    weights = [np.full(len(r.chunks), (r.output_tokens or 0) / len(r.chunks)) for r in streamed]
    return np.histogram(np.concatenate(times), edges, weights=np.concatenate(weights))[0]


def unknown_tokens(results: Sequence[Result]) -> int:
    """How many streamed answers came to their end without the server's count of their tokens."""
    return sum(r.output_tokens is None for r in results if r.chunks)


def failures(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Requests that did not succeed, one row per kind: how many, and the first message."""
    kinds = Counter((r.status, r.error) for r in results if r.error)
    rows = []
    for (status, error), count in kinds.most_common():
        first = next(r for r in results if (r.status, r.error) == (status, error))
        rows.append({"status": status, "error": error, "count": count, "message": first.message})
    return rows


def counts(results: Sequence[Result]) -> dict[str, int]:
    """How many requests were planned, and how each ended."""
    found = Counter(r.status for r in results)
    return {"planned": len(results)} | {status: found[status] for status in STATUSES}
