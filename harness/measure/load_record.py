"""A load's record: everything that was asked for and everything that happened. Pure."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..analysis.quality import quality_record
from ..client.load_plan import Plan
from ..client.load_settings import LoadSpecification
from ..client.result import SUCCEEDED, Result
from ..client.sampling import Sampler
from ..client.scrape import LIVE_SHARE
from ..client.summary import (
    TIMELINE_BIN_S,
    counts,
    failures,
    members_of,
    spans,
    summarize,
    token_timeline,
    unknown_tokens,
)
from ..client.target import Target
from ..records.provenance import provenance, timestamp

SCHEMA_VERSION = 2
OURS = "kv_eviction_"
LAG_LIMIT_MS = 1.0
"""Above this median send lag the client, not the server, shapes the load."""


MEASURING = ("harness.measure.load", "harness.resources.server", "harness.resources.serve_flags")
"""What a record depends on, beside the plugin."""


def load_provenance() -> dict[str, Any]:
    """Versions, hardware and code, where server and client are one machine's."""
    return provenance(MEASURING, "cuda" if shutil.which("nvidia-smi") else "cpu")


def load_record(
    s: LoadSpecification,
    plan: Plan,
    target: Target,
    results: Sequence[Result],
    sampler: Sampler,
    started_at: float,
    stop_reason: str | None,
) -> dict[str, Any]:
    """Schema version 2. All times are seconds from ``started_at`` (Unix time).

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
    tokens = token_timeline(results, edges)
    samples = sampler.columns()
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
        "warnings": [*warnings(s, summary, results, samples), *sampler.warnings()],
        "summary": summary,
        "quality": quality_record(results, plan.windows, s.quality.chunk),
        "memory": memory(samples, sampler.cache_config, ranges["steady"]),
        "output_tokens": {
            "bin_s": TIMELINE_BIN_S,
            "tokens": None if tokens is None else [round(float(n), 2) for n in tokens],
        },
        "samples": samples,
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
            "output_tokens": "by the server's own count; null: it sent none",
            "output_throughput": "output tokens per second",
            "goodput": "requests per second that met every objective",
            "kv_cache_usage": "share of the pool's blocks that is held",
            "kv_eviction_live_share": "share still held of the full blocks of running requests "
            "that evict",
            "evicted_share": "1 - mean kv_eviction_live_share: what of the blocks was evicted, as "
            "measured over the steady span; null: unknown",
        },
        **load_provenance(),
    }


def memory(
    columns: dict[str, Any], cache_config: dict[str, int], span: tuple[float, float]
) -> dict[str, Any]:
    """KV pool, what of it was held over the steady span (by the samples in it), and by how much
    counters grew over the run.

    ``evicted_share`` is what eviction really came to: 1 minus the mean share of blocks that
    requests which evict still held. None where no sample of the span knows that share.
    """
    result: dict[str, Any] = dict(cache_config)
    for name in (
        "kv_cache_usage",
        "num_requests_running",
        "num_requests_waiting",
        "process_memory_mib",
        "device_memory_mib",
    ):
        inside = _inside(columns, name, span)
        if len(inside):
            result[name] = {"mean": float(inside.mean()), "max": float(inside.max())}
    shares = _inside(columns, LIVE_SHARE, span)
    if len(shares):
        result[LIVE_SHARE] = {"mean": float(shares.mean()), "min": float(shares.min())}
    result["evicted_share"] = 1 - float(shares.mean()) if len(shares) else None
    counters = {"num_preemptions": "preemptions"} | {
        name: name
        for name in columns
        if name.startswith(OURS)
        and not name.startswith(LIVE_SHARE)
        and not name.endswith("_time_s")
    }
    for name, shown in counters.items():
        values = columns.get(name, [])
        if len(values):
            result[shown] = values[-1] - values[0]
    return result


def _inside(columns: dict[str, Any], name: str, span: tuple[float, float]) -> np.ndarray:
    """Values of the samples within a span, ``[n]``; none of a series that is not there."""
    times = np.array(columns.get(f"{name}_time_s", columns["time_s"]))
    values = np.array(columns.get(name, []))
    return values[(times >= span[0]) & (times <= span[1])] if len(values) else values


def warnings(
    s: LoadSpecification,
    summary: dict[str, dict[str, Any]],
    results: Sequence[Result],
    samples: dict[str, Any],
) -> list[str]:
    """What makes the figures less than they look, one sentence each."""
    found = []
    lag = summary["all"]["send_lag_ms"]
    if s.open_loop and lag is not None and lag["p50"] > LAG_LIMIT_MS:
        found.append(
            f"the client fell behind: requests left {lag['p50']:.1f} ms (median) after their time, "
            f"more than {LAG_LIMIT_MS:g} ms; lower the request rate or give the client a core of "
            "its own"
        )
    if (s.warm_up_s or s.cool_down_s) and not summary["steady"]["counts"]["planned"]:
        found.append(
            f"no request was sent between a --warm-up of {s.warm_up_s:g} s and a --cool-down of "
            f"{s.cool_down_s:g} s, so the steady figures are empty; lower them, or send more"
        )
    if (
        samples["time_s"]
        and any(name.startswith("kv_") for name in s.settings)
        and not any(name.startswith(OURS) for name in samples)
    ):
        found.append(
            f"the server has no metrics of the plugin, so it may well have ignored "
            f"{', '.join(s.settings)}"
        )
    if unknown := unknown_tokens(results):
        found.append(
            f"the server sent no usage with {unknown} answers: output tokens, output throughput "
            "and time per output token are unknown, and these answers' lengths were not checked"
        )
    if chunks := sum(r.counted_by_chunks for r in results):
        found.append(
            f"{chunks} answers broke off before the server's own count; their tokens are counted "
            "by chunks, which is a lower bound"
        )
    return found


def _columns(results: Sequence[Result]) -> dict[str, list[Any]]:
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
