"""From serving records to figures per method, sparsity and rate, over seeds. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..client.slo import holds
from .perplexity import total
from .quality import kept_to_chunk, perplexity_or_none
from .statistics import mean_interval, ratio_interval

Metric = Callable[[Mapping[str, Any]], float | None]
METRICS: dict[str, Metric] = {}


def _metric(name: str) -> Callable[[Metric], Metric]:
    def register(function: Metric) -> Metric:
        METRICS[name] = function
        return function

    return register


def _steady(name: str, statistic: str) -> None:
    def read(record: Mapping[str, Any]) -> float | None:
        values = record["summary"]["steady"][name]
        return None if values is None else values[statistic]

    METRICS[f"{name}.{statistic}"] = read


for _name, _statistics in {
    "time_to_first_token_ms": ("mean", "p50", "p95", "p99"),
    "time_per_output_token_ms": ("mean", "p50", "p95", "p99"),
    "inter_token_latency_ms": ("p50", "p99"),
    "end_to_end_latency_ms": ("mean", "p50", "p95", "p99"),
}.items():
    for _statistic in _statistics:
        _steady(_name, _statistic)


def _of_the_span(name: str) -> None:
    METRICS[name] = lambda record: record["summary"]["steady"][name]


for _name in ("request_throughput", "output_throughput", "goodput", "good_share"):
    _of_the_span(_name)


@_metric("duration_s")
def _duration(record: Mapping[str, Any]) -> float:
    return record["duration_s"]


@_metric("peak_concurrency")
def _running(record: Mapping[str, Any]) -> float | None:
    """Requests the server had in its batch at the most; those waiting are not in it."""
    return _memory(record, "num_requests_running", "max")


@_metric("mean_concurrency")
def _mean_running(record: Mapping[str, Any]) -> float | None:
    return _memory(record, "num_requests_running", "mean")


@_metric("peak_waiting")
def _waiting(record: Mapping[str, Any]) -> float | None:
    return _memory(record, "num_requests_waiting", "max")


@_metric("kv_usage_mean")
def _usage_mean(record: Mapping[str, Any]) -> float | None:
    return _memory(record, "kv_cache_usage", "mean")


@_metric("kv_usage_max")
def _usage_max(record: Mapping[str, Any]) -> float | None:
    return _memory(record, "kv_cache_usage", "max")


@_metric("kv_mib_per_request")
def _kv_per_request(record: Mapping[str, Any]) -> float | None:
    """KV memory that was held over the run, per request in the batch."""
    pool = record["memory"].get("kv_cache_memory_bytes")
    usage, running = _usage_mean(record), _mean_running(record)
    return pool / 2**20 * usage / running if pool and usage is not None and running else None


@_metric("preemptions")
def _preemptions(record: Mapping[str, Any]) -> float | None:
    return record["memory"].get("preemptions")


@_metric("perplexity")
def _perplexity(record: Mapping[str, Any]) -> float | None:
    """Over the windows that count in the runs of *every* method at this rate and seed."""
    return record.get("shared_perplexity")


def with_shared_perplexity(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """``records``, each with ``shared_perplexity``: methods are compared on the same windows.

    Which windows count under a method depends on preemptions, so on the method. None where no
    window counts under all of them.
    """
    common: dict[tuple[Any, ...], set[int]] = {}
    counted = [
        {w["window"]: w for w in r["quality"]["windows"] if kept_to_chunk(w)}
        if r["quality"]
        else {}
        for r in records
    ]
    keys = [(r["run"]["request_rate"], r["run"]["seed"]) for r in records]
    for key, windows in zip(keys, counted, strict=True):
        common[key] = common.get(key, set(windows)) & set(windows)
    return [
        {
            **record,
            "shared_perplexity": perplexity_or_none(total(windows[i]) for i in sorted(common[key])),
            "shared_windows": len(common[key]),
        }
        for key, windows, record in zip(keys, counted, records, strict=True)
    ]


def aggregate_sweep(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry per method, sparsity and rate, in the order of ``records``.

    Each metric is ``{mean, low, high, num_runs}`` with a 95% t interval over seeds (low = high =
    mean for one seed), or None where a run lacks it.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        run = record["run"]
        groups.setdefault((*_level(run), run["request_rate"]), []).append(record)
    entries = []
    for (method, sparsity, budget, rate), group in groups.items():
        entry: dict[str, Any] = {
            "method": method,
            "sparsity": sparsity,
            "budget_tokens": budget,
            "request_rate": rate,
            "num_runs": len(group),
            "not_succeeded": sum(r["counts"]["planned"] - r["counts"]["succeeded"] for r in group),
            "within_slo": [
                holds(r["summary"]["steady"], r["run"]["slo"]) for r in group if r["run"]["slo"]
            ],
        }
        for name, read in METRICS.items():
            entry[name] = _interval([read(record) for record in group])
        entries.append(entry)
    return entries


RATIOS = (
    "output_throughput",
    "request_throughput",
    "time_to_first_token_ms.p50",
    "time_per_output_token_ms.p50",
    "end_to_end_latency_ms.p50",
    "mean_concurrency",
    "kv_mib_per_request",
    "perplexity",
)


def against_baseline(records: Sequence[Mapping[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """Ratios to ``baseline`` (a method) at the same rate and seed, so at the same arrivals.

    Each is the geometric mean over seeds with a 95% t interval of the logarithm; None where a run
    lacks the metric or it is 0. Empty without runs of the baseline.
    """
    keys = [(r["run"]["request_rate"], r["run"]["seed"]) for r in records]
    base = {k: r for k, r in zip(keys, records, strict=True) if r["run"]["method"] == baseline}
    groups: dict[tuple[Any, ...], list[tuple[Any, Any]]] = {}
    for key, record in zip(keys, records, strict=True):
        run = record["run"]
        if run["method"] != baseline and key in base:
            group = *_level(run), run["request_rate"]
            groups.setdefault(group, []).append((record, base[key]))
    rows = []
    for (method, sparsity, budget, rate), pairs in groups.items():
        row: dict[str, Any] = {
            "method": method,
            "sparsity": sparsity,
            "budget_tokens": budget,
            "request_rate": rate,
        }
        for name in RATIOS:
            read = METRICS[name]
            row[name] = ratio_interval([(read(record), read(other)) for record, other in pairs])
        rows.append(row)
    return rows


def max_rates(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per method and sparsity, the highest tested rate up to which every seed kept the objectives.

    ``first_broken`` is the next tested rate, None where all were kept: the true limit lies between
    the two. ``max_rate`` is None where the lowest rate broke them already.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for entry in entries:
        if entry["request_rate"] is not None and entry["within_slo"]:
            groups.setdefault(_level(entry), []).append(entry)
    rows = []
    for (method, sparsity, budget), group in groups.items():
        best = broken = None
        for entry in sorted(group, key=lambda entry: entry["request_rate"]):
            if not all(entry["within_slo"]):
                broken = entry["request_rate"]
                break
            best = entry["request_rate"]
        rows.append(
            {
                "method": method,
                "sparsity": sparsity,
                "budget_tokens": budget,
                "max_rate": best,
                "first_broken": broken,
            }
        )
    return rows


def _level(run: Mapping[str, Any]) -> tuple[str, float, int | None]:
    return run["method"], run["sparsity"], run.get("budget_tokens")


def _memory(record: Mapping[str, Any], name: str, statistic: str) -> float | None:
    values = record["memory"].get(name)
    return None if values is None else values[statistic]


def _interval(values: list[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    mean, low, high = mean_interval(np.asarray(known, dtype=np.float64))
    return {"mean": mean, "low": low, "high": high, "num_runs": len(known)}
