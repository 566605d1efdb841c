"""A load on an engine of its own: raw record out."""

from __future__ import annotations

from typing import Any

from ..records.head import record_head
from ..records.provenance import SCHEMA_VERSION
from ..records.specifications import STEADY
from ..resources.batch_engine import BatchEngine
from ..study.bench_load import BenchRun

UNITS = {
    "*_seconds": "seconds, wall time",
    "seconds": "from the batch's first request to its last token",
    "seconds_by_turn": "of each turn; seconds is their sum",
    "prompt_tokens": "asked, of all requests and turns",
    "cached_tokens": "of prompt_tokens, those that came from the prefix cache",
    "output_tokens_per_second": "output tokens of all requests by seconds",
    "kv_cache_tokens": "tokens that the KV pool holds without eviction",
    "preemptions": "requests that lost their KV cache and were computed anew",
    "eviction.average_blocks": "blocks of a request, on average over its steps and the requests",
    "eviction.effective_sparsity": "mean over requests of what the budget came to",
    "scoring_seconds": "by phase, of the batch",
    "effective_sparsity": "what the budget comes to at a request's end",
}


_OF_BATCHES = ("seconds_by_turn", "prompt_tokens", "cached_tokens")
STEADY_UNITS = {
    **{name: unit for name, unit in UNITS.items() if name not in _OF_BATCHES},
    "seconds": "of the window, wall time; what counts or takes time is the window's, but split",
    "sub_windows": "output tokens per second in equal parts of the window",
    "ms_per_step": "milliseconds, wall time, without a profiler",
    "tokens_per_step": "output tokens of all requests",
    "running": "requests that vLLM runs, on average over the window's steps",
    "kv_blocks": "blocks of the KV pool",
    "kv_blocks_used": "of them, on average over the window's steps",
    "decision_seconds": "seconds the scheduler spent deciding",
    "scoring_seconds": "by phase",
    "eviction": "over the requests that ended, also before the window",
    "host": "milliseconds per step by what the thread of vLLM's core works at, right after the "
    "window; null where that is not told",
    "split": "milliseconds per step on the device, by class of kernel, of profiled steps right "
    "after the window; idle: nothing ran there; null on a CPU",
}


_WARM_UP_SEED = 2**63
"""Warm-ups have other tokens than any batch: what they leave in a cache must not be found."""


class PolicyFailed(RuntimeError):
    """The engine is well, but a policy failed for some requests: the batch is not the method's."""


def warm_up(run: BenchRun, engine: BatchEngine) -> None:
    """Run what a load wants to have run before, once under the same settings."""
    if run.settings in engine.warm or run.measurement.warm_up is None:
        return
    engine.run(run.measurement.warm_up, _WARM_UP_SEED + run.seed, run.settings)
    engine.warm.append(run.settings)


def measure_batch(run: BenchRun, engine: BatchEngine) -> dict[str, Any]:
    """The record of a run.

    Raises:
        PolicyFailed: a policy failed. ``BatchEngineError``: the engine did.

    """
    measured = engine.run(run.measurement, run.seed, run.settings)
    if failed := (measured["eviction"] or {}).get("policy_errors"):
        raise PolicyFailed(f"policy {run.method.policy} failed for {failed} requests of the batch")
    return {
        **record_head(run, SCHEMA_VERSION),
        "output_tokens_per_second": measured["output_tokens"] / measured["seconds"],
        **measured,
        **engine.ready,
        "units": STEADY_UNITS if run.kind == STEADY else UNITS,
        "specification": run.to_dict(),
    }
