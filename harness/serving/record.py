"""A load's record: everything that was asked for and everything that happened. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..records import timestamp
from .plan import Plan
from .provenance import here
from .quality import quality_record
from .result import SUCCEEDED, Result
from .sampling import Sampler
from .specification import LoadSpecification
from .summary import (
    TIMELINE_BIN_S,
    counts,
    failures,
    members_of,
    spans,
    summarize,
    token_timeline,
)
from .target import Target

SCHEMA_VERSION = 1
OURS = "kv_eviction_"
LAG_LIMIT_MS = 1.0
"""Above this median send lag the client, not the server, shapes the load."""


def load_record(
    s: LoadSpecification,
    plan: Plan,
    target: Target,
    results: Sequence[Result],
    sampler: Sampler,
    started_at: float,
    stop_reason: str | None,
) -> dict[str, Any]:
    """Schema version 1. All times are seconds from ``started_at`` (Unix time).

    ``summary.all`` is over every request, ``summary.steady`` leaves out warm-up and cool-down;
    ``requests`` has one entry per succeeded load request, ``not_succeeded`` the others whole.
    """
    ranges = spans(results, s.warm_up_s, s.cool_down_s)
    summary = {
        name: summarize(
            results,
            results if name == "all" else members_of(results, span),
            span,
            s.open_loop,
            s.slo,
        )
        for name, span in ranges.items()
    }
    end = ranges["all"][1]
    edges = np.arange(int(np.ceil(end / TIMELINE_BIN_S)) + 1) * TIMELINE_BIN_S
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "load",
        "timestamp": timestamp(),
        "complete": stop_reason is None,
        "stop_reason": stop_reason,
        "started_at": started_at,
        "duration_s": end,
        "specification": s.to_dict(),
        "target": target.to_dict(),
        "counts": counts(results),
        "failures": failures(results),
        "warnings": warnings(s, summary["all"], sampler.failed),
        "summary": summary,
        "quality": quality_record(results, plan.windows, s.quality.chunk),
        "memory": memory(sampler.columns(), sampler.cache_config, ranges["steady"]),
        "output_tokens": {
            "bin_s": TIMELINE_BIN_S,
            "tokens": [round(float(n), 2) for n in token_timeline(results, edges)],
        },
        "samples": sampler.columns(),
        "requests": _columns([r for r in results if r.status == SUCCEEDED and r.chunks]),
        "not_succeeded": [
            {
                "index": r.index,
                "kind": r.kind,
                "status": r.status,
                "error": r.error,
                "message": r.message,
                "intended_s": r.intended,
                "sent_s": r.sent,
                "end_s": r.end,
                "output_tokens": r.output_tokens,
            }
            for r in results
            if r.status != SUCCEEDED
        ],
        "units": {
            "*_ms": "milliseconds; in an open loop from the intended send time",
            "request_throughput": "requests completed per second",
            "output_throughput": "output tokens per second",
            "goodput": "requests per second that met every objective",
            "kv_cache_usage": "share of the pool's blocks that is held",
        },
        **here(),
    }


def memory(
    columns: dict[str, Any], cache_config: dict[str, int], span: tuple[float, float]
) -> dict[str, Any]:
    """KV pool, what of it was held over the steady span (by the samples in it), and by how much
    counters grew over the run."""
    result: dict[str, Any] = dict(cache_config)
    for name in (
        "kv_cache_usage",
        "num_requests_running",
        "num_requests_waiting",
        "process_memory_mib",
        "device_memory_mib",
    ):
        times = np.array(columns.get(f"{name}_time_s", columns["time_s"]))
        values = np.array(columns.get(name, []))
        if not len(values):
            continue
        inside = values[(times >= span[0]) & (times <= span[1])]
        if len(inside):
            result[name] = {"mean": float(inside.mean()), "max": float(inside.max())}
    counters = {"num_preemptions": "preemptions"} | {
        name: name
        for name in columns
        if name.startswith(OURS) and not name.startswith(f"{OURS}live_share")
    }
    for name, shown in counters.items():
        values = columns.get(name, [])
        if len(values):
            result[shown] = values[-1] - values[0]
    return result


def warnings(s: LoadSpecification, summary: dict[str, Any], failed_samples: int) -> list[str]:
    """What makes the figures less than they look, one sentence each."""
    found = []
    lag = summary["send_lag_ms"]
    if s.open_loop and lag is not None and lag["p50"] > LAG_LIMIT_MS:
        found.append(
            f"the client fell behind: requests left {lag['p50']:.1f} ms (median) after their time, "
            f"more than {LAG_LIMIT_MS:g} ms; lower the request rate or give the client a core of "
            "its own"
        )
    if failed_samples:
        found.append(f"{failed_samples} samples of /metrics failed and are missing")
    return found


def _columns(results: Sequence[Result]) -> dict[str, list[float]]:
    return {
        "index": [r.index for r in results],
        "prompt_tokens": [r.prompt_tokens for r in results],
        "output_tokens": [r.output_tokens for r in results],
        "chunks": [len(r.chunks) for r in results],
        "intended_s": [round(r.intended, 5) for r in results if r.intended is not None],
        "sent_s": [round(r.sent, 5) for r in results if r.sent is not None],
        "first_token_s": [round(r.chunks[0], 5) for r in results],
        "last_token_s": [round(r.chunks[-1], 5) for r in results],
        "end_s": [round(r.end, 5) for r in results if r.end is not None],
        "max_gap_ms": [
            round(float(1000 * np.diff(r.chunks).max()), 2) if len(r.chunks) > 1 else 0.0
            for r in results
        ],
    }
