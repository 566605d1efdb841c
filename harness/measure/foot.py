"""What the records of all offline runs have in common beside their head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..records.machine import device_memory_mib, process_peak_memory_mib
from ..resources.engine import Engine
from ..study.specification import OfflineRun

UNITS = {
    "effective_sparsity": "share of a whole window's blocks that the budget lets go; at least "
    "min_blocks stay, and blocks are whole",
    "tokens_per_second": "tokens scored (log-probs on) per second, all windows in flight",
    "peak_memory_mib": "MiB of KV blocks held at the peak, all requests in flight",
    "process_peak_memory_mib": "MiB resident, whole process so far, pool reserved up front",
    "device_memory_mib": "MiB in use on the GPU, pool reserved up front; null without a GPU",
    "avg_cache_size": "KV blocks per window, mean over its steps and layer groups",
    "peak_cache_size": "KV blocks per window, mean over layer groups",
    "decision_seconds": "seconds the scheduler spent deciding, whole run",
    "log_likelihoods": "nats, one sum per chunk of queries; query i predicts token i + 1",
    "prefill_tokens_per_second": "prompt tokens per second, requests of one output token",
    "output_tokens_per_second": "output tokens per second, prompts included in the time",
    "decode_tokens_per_second": "output tokens after the first, per second that the load took "
    "longer than its prompts alone",
    "score": "0 to 1, mean over samples; null where nothing is right or wrong",
    "ended_share": "share of answers that an end-of-sequence token ended",
    "repetition": "share of an answer's runs of 4 tokens that have been there before",
    "cache_trace": "blocks per window after so many tokens, first windows in flight",
}


def memory(engine: Engine, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Memory held, and what was evicted, by the records of a run's requests."""
    return {
        "peak_memory_mib": engine.peak_memory_mib(records),
        "process_peak_memory_mib": process_peak_memory_mib(),
        "device_memory_mib": device_memory_mib(engine.device),
        "blocks_evicted": sum(record["blocks_evicted"] for record in records),
        "decisions": sum(record["decisions"] for record in records),
        "decision_seconds": sum(record["decision_seconds"] for record in records),
        "preemptions": sum(record["preemptions"] for record in records),
    }


def run_foot(run: OfflineRun, engine: Engine) -> dict[str, Any]:
    """Units, specification and engine of a run."""
    return {
        "units": UNITS,
        "specification": run.to_dict(),
        "engine": {
            "dtype": engine.dtype,
            "num_layers": engine.num_layers,
            "num_blocks": engine.num_blocks,
            "bytes_per_block": engine.bytes_per_block,
        },
    }
