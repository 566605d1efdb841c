"""Runs of a comparison, one engine for all of them: raw records out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .corpora import load_text
from .engine import Engine, ScoredWindow, running
from .perplexity import after_eviction, by_chunk, perplexity, total
from .records import (
    SCHEMA_VERSION,
    process_peak_memory_mb,
    provenance,
    timestamp,
    write_json,
)
from .specification import RunSpecification, settings_for
from .workload import draw_windows


def evaluate(
    runs: Sequence[RunSpecification],
    folder: Path,
    progress: Callable[[str, int], None] = lambda label, finished: None,
) -> list[dict[str, Any]]:
    """Run everything on one engine; each record is written as soon as it is there.

    Args:
        runs: all under the same ``EngineSpecification`` and dataset.
        folder: where ``<run>.json`` files go.
        progress: called with the run's key and the number of windows just finished.

    """
    text = load_text(runs[0].dataset)
    source = provenance()
    records = []
    with running(runs[0].engine) as engine:
        tokens = engine.tokenize(text)
        for run in runs:
            draw_windows(tokens, run.num_samples, run.engine.context_length, run.seed)
        _warm_up(engine, tokens)
        for run in runs:
            windows = draw_windows(tokens, run.num_samples, run.engine.context_length, run.seed)
            scored, seconds = engine.score(
                [window for _, window in windows],
                settings_for(run.method, run.sparsity),
                lambda finished, key=run.key: progress(key, finished),
            )
            record = _record(run, engine, [start for start, _ in windows], scored, seconds)
            record.update(source)
            write_json(folder / run.file_name, record)
            records.append(record)
    return records


def _warm_up(engine: Engine, tokens: list[int]) -> None:
    """The first steps of an engine are slow (thread pools, page faults); they time nobody."""
    specification = engine.specification
    length = min(2 * specification.prefill_chunk, specification.context_length)
    windows = [tokens[:length]] * specification.max_num_seqs
    engine.score(windows, {"kv_policy": "dense"})


def _record(
    run: RunSpecification,
    engine: Engine,
    starts: list[int],
    scored: Sequence[ScoredWindow],
    seconds: float,
) -> dict[str, Any]:
    chunk = run.engine.prefill_chunk
    windows = [
        {"start": start, "eviction": window.record, **by_chunk(window.log_likelihoods, chunk)}
        for start, window in zip(starts, scored, strict=True)
    ]
    evicted = after_eviction(windows, [w.record["first_eviction_tokens"] for w in scored])
    total_tokens = sum(window["num_predictions"] for window in windows)
    return {
        "schema_version": SCHEMA_VERSION,
        "timestamp": timestamp(),
        "key": run.key,
        "method": run.method,
        "sparsity": run.sparsity,
        "seed": run.seed,
        "perplexity": perplexity(map(total, windows)),
        "perplexity_after_eviction": perplexity(evicted) if evicted else None,
        "tokens_per_second": total_tokens / seconds,
        "peak_memory_mb": engine.peak_memory_mb(scored),
        "process_peak_memory_mb": process_peak_memory_mb(),
        "avg_cache_size": float(np.mean([w.record["average_blocks"] for w in scored])),
        "peak_cache_size": max(w.record["peak_blocks"] for w in scored),
        "total_tokens": total_tokens,
        "runtime_seconds": seconds,
        "units": {
            "tokens_per_second": "prompt tokens scored (log-probs on) per second, all windows",
            "peak_memory_mb": "MiB of KV blocks held at the peak, all windows in flight",
            "process_peak_memory_mb": "MiB resident, whole process so far, pool reserved up front",
            "avg_cache_size": "KV blocks per window, mean over its steps and layer groups",
            "peak_cache_size": "KV blocks per window, mean over layer groups",
            "log_likelihoods": "nats, one sum per chunk of queries; query i predicts token i + 1",
        },
        "specification": run.to_dict(),
        "engine": {
            "dtype": engine.dtype,
            "num_layers": engine.num_layers,
            "num_blocks": engine.num_blocks,
            "bytes_per_block": engine.bytes_per_block,
        },
        "windows": windows,
    }
