"""A batch on an engine of its own: raw record out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..records.head import record_head
from ..records.provenance import SCHEMA_VERSION
from ..resources.batch_engine import BatchEngine
from ..study.batch_specification import BatchRun

UNITS = {
    "*_seconds": "seconds, wall time",
    "seconds": "from the batch's first request to its last token",
    "output_tokens_per_second": "output tokens of all requests by seconds",
    "kv_cache_tokens": "tokens that the KV pool holds without eviction",
    "preemptions": "requests that lost their KV cache and were computed anew",
    "eviction.average_blocks": "blocks of a request, on average over its steps and the requests",
    "eviction.effective_sparsity": "mean over requests of what the budget came to",
    "scoring_seconds": "by phase, of the batch",
    "effective_sparsity": "what the budget comes to at a request's end",
}


class PolicyFailed(RuntimeError):
    """The engine is well, but a policy failed for some requests: the batch is not the method's."""


def warm_up(run: BatchRun, engine: BatchEngine) -> None:
    """Run a small batch, once under the same settings: first steps are slow."""
    if run.settings in engine.warm:
        return
    batch = run.measurement
    small = replace(
        batch,
        num_requests=min(batch.warm_up_requests, batch.num_requests),
        output_tokens=min(batch.warm_up_output_tokens, batch.output_tokens),
    )
    engine.run(small, run.seed, run.settings)
    engine.warm.append(run.settings)


def measure_batch(run: BatchRun, engine: BatchEngine) -> dict[str, Any]:
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
        "units": UNITS,
        "specification": run.to_dict(),
    }
