"""Tables of a serving study, from aggregated results; nothing is computed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..analysis.estimate import Estimate
from ..analysis.serving_aggregate import RATIOS
from .cells import times
from .serving_figures import label

_COLUMNS = {
    "output_throughput": "output tok/s",
    "request_throughput": "requests/s",
    "time_to_first_token_ms.p50": "TTFT p50, ms",
    "time_to_first_token_ms.p99": "TTFT p99, ms",
    "time_per_output_token_ms.p50": "TPOT p50, ms",
    "time_per_output_token_ms.p95": "TPOT p95, ms",
    "end_to_end_latency_ms.p50": "latency p50, ms",
    "goodput": "goodput, 1/s",
    "mean_concurrency": "in batch, mean",
    "peak_concurrency": "in batch, peak",
    "stay_growth": "stay, later half by earlier",
    "kv_usage_mean": "KV pool held, mean",
    "kv_mib_per_request": "KV MiB/request",
    "preemptions": "preemptions",
    "perplexity": "perplexity",
}


def load_rows(entries: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    columns = {key: name for key, name in _COLUMNS.items() if any(e[key] for e in entries)}
    with_rate = any(entry["request_rate"] is not None for entry in entries)
    header = ("method", *(("rate, 1/s",) if with_rate else ()), *columns.values())
    rows = [header]
    for entry in entries:
        rate = (f"{entry['request_rate']:g}",) if entry["request_rate"] is not None else ("-",)
        rows.append(
            (label(entry), *(rate if with_rate else ()), *(_cell(entry[key]) for key in columns))
        )
    return rows


def ratio_rows(entries: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    columns = {
        name: _COLUMNS[name].split(",")[0]
        for name in RATIOS
        if any(entry["against_baseline"][name] for entry in entries)
    }
    with_rate = any(entry["request_rate"] is not None for entry in entries)
    rows = [("method", *(("rate, 1/s",) if with_rate else ()), *columns.values())]
    for entry in entries:
        cells = [times(entry["against_baseline"][name]) for name in columns]
        rate = "-" if entry["request_rate"] is None else f"{entry['request_rate']:g}"
        rows.append((label(entry), *((rate,) if with_rate else ()), *cells))
    return rows


def rate_rows(rates: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("method", "highest rate kept, 1/s", "next rate tested, broken")]
    for row in rates:
        rows.append(
            (
                label(row),
                "none" if row["max_rate"] is None else f"{row['max_rate']:g}",
                "-" if row["first_broken"] is None else f"{row['first_broken']:g}",
            )
        )
    return rows


def _cell(value: Estimate | None) -> str:
    if value is None:
        return "-"
    digits = 0 if abs(value["mean"]) >= 100 else 1 if abs(value["mean"]) >= 10 else 2
    text = f"{value['mean']:.{digits}f}"
    if value["num_runs"] > 1:
        text += f" ± {value['high'] - value['mean']:.{digits}f}"
    return text
