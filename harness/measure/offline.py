"""One run on a running engine: raw record out. Perplexity and throughput are separate passes,
because log-probs slow an engine down."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..analysis.perplexity import (
    after_eviction,
    by_chunk,
    first_affected,
    normalised,
    perplexity,
    total,
)
from ..inputs.windows import Window, tokens_sha256
from ..records.common_fields import stored_once
from ..records.head import record_head
from ..records.provenance import SCHEMA_VERSION
from ..resources.engine import Engine
from ..resources.scored import NotFinite, ScoredWindow
from ..study.specification import OfflineRun, Perplexity, Throughput
from .foot import memory, run_foot

Progress = Callable[[int], None]


DECODED_PER_SUM = 64
"""Predictions behind one sum of a record, where tokens are decoded one by one."""


def warm_up(engine: Engine, window: list[int]) -> None:
    """The first steps of an engine are slow (thread pools, page faults, captured graphs); they
    time nobody."""
    specification = engine.specification
    length = min(2 * specification.prefill_chunk, specification.context_length)
    windows = [window[:length]] * specification.kv_pool_windows
    engine.score(windows, {"kv_policy": "dense"})


def measure_perplexity(
    run: OfflineRun,
    engine: Engine,
    windows: Sequence[Window],
    sizes: Sequence[dict[str, int]],
    progress: Progress,
) -> dict[str, Any]:
    """Score a run's windows; ``sizes``: ``scored_text`` of each.

    Raises:
        NotFinite: a scored token has no finite log-prob, so there is no perplexity.
            ``UnfaithfulRun``: see ``Engine.score``.

    """
    assert isinstance(run.measurement, Perplexity)
    min_context = run.measurement.min_context
    scored = engine.score([w for _, w in windows], run.settings, min_context, progress)
    for (start, _), result in zip(windows, scored.windows, strict=True):
        _check_finite(start, result, min_context)
    chunk = run.resource.prefill_chunk
    if run.resource.protocol == "decode":
        chunk = min(chunk, DECODED_PER_SUM)  # evictions come between any two tokens
    entries = [
        {
            "start": start,
            "eviction": result.record,
            **size,
            **by_chunk(result.log_likelihoods, chunk, min_context),
        }
        for (start, _), size, result in zip(windows, sizes, scored.windows, strict=True)
    ]
    evicted = after_eviction(entries, map(first_affected, entries))
    records = [entry["eviction"] for entry in entries]
    total_tokens = sum(total(entry)[1] for entry in entries)
    return {
        **record_head(run, SCHEMA_VERSION),
        "perplexity": perplexity(map(total, entries)),
        "perplexity_after_eviction": perplexity(evicted) if evicted else None,
        **normalised(entries),
        "tokens_per_second": total_tokens / scored.seconds,
        **memory(engine, records),
        "avg_cache_size": float(np.mean([record["average_blocks"] for record in records])),
        "peak_cache_size": max(record["peak_blocks"] for record in records),
        "total_tokens": total_tokens,
        "runtime_seconds": scored.seconds,
        **run_foot(run, engine),
        "cache_trace": scored.trace,
        "tokens_sha256": tokens_sha256(window for _, window in windows),
        **stored_once(entries),
    }


def measure_throughput(
    run: OfflineRun, engine: Engine, prompts: Sequence[list[int]], progress: Progress
) -> dict[str, Any]:
    """Serve a run's load twice: its prompts alone, then with their outputs."""
    assert isinstance(run.measurement, Throughput)
    load = run.measurement.load
    short = [p[: 2 * run.resource.prefill_chunk] for p in prompts[: run.resource.kv_pool_windows]]
    engine.load(short, 4, run.settings)
    prefill_seconds, _ = engine.load(prompts, 1, run.settings, progress)
    seconds, records = engine.load(prompts, load.output_tokens, run.settings, progress)
    decode_seconds = seconds - prefill_seconds
    decoded = load.num_requests * (load.output_tokens - 1)
    return {
        **record_head(run, SCHEMA_VERSION),
        "prefill_tokens_per_second": load.num_requests * load.prompt_tokens / prefill_seconds,
        "output_tokens_per_second": load.num_requests * load.output_tokens / seconds,
        "decode_tokens_per_second": decoded / decode_seconds if decode_seconds > 0 else None,
        **memory(engine, records),
        "runtime_seconds": prefill_seconds + seconds,
        "prefill_seconds": prefill_seconds,
        "load_seconds": seconds,
        **run_foot(run, engine),
    }


def _check_finite(start: int, result: ScoredWindow, min_context: int) -> None:
    for i, value in enumerate(result.log_likelihoods[min_context - 1 :], min_context):
        if not math.isfinite(value):
            raise NotFinite(
                f"the log-prob of token {i} of the window at {start} is {value}, so the run has no "
                f"perplexity; another --dtype may help"
            )
