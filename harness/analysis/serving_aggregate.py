"""From serving records to figures per method, sparsity and rate, over seeds. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..client.slo import holds
from ..records.specifications import level
from .perplexity import total
from .quality import kept_to_chunk, perplexity_or_none
from .statistics import estimate, ratio_estimate

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


@_metric("stay_growth")
def _stay_growth(record: Mapping[str, Any]) -> float | None:
    """Mean time from sending to end, of requests sent in the later half of the arrivals by those
    of the earlier half, the warm-up left out.

    About 1 where the server keeps up, however many came in either half; more where it falls behind,
    and less where a load is so short that its last requests end while no more come.
    """
    served, rest = record["requests"], record["not_succeeded"]
    stays = [*zip(served["sent_s"], served["end_s"], strict=True)]
    stays += [(r["sent_s"], r["end_s"]) for r in rest if None not in (r["sent_s"], r["end_s"])]
    if not stays:
        return None
    sent, end = np.array(stays).T
    start = record["summary"]["steady"]["span_s"][0]
    later = sent >= (start + sent.max()) / 2
    earlier = (sent >= start) & ~later
    if not earlier.any():
        return None
    return float((end - sent)[later].mean() / (end - sent)[earlier].mean())


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
    keys = [_load_of(record) for record in records]
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


def aggregate_serving(
    records: Sequence[Mapping[str, Any]], baseline: str | None = None
) -> dict[str, Any]:
    """``{"h2o_s0.9_rate4": {"method", ..., "request_rate", "num_runs", metric: Estimate}}``.

    A metric is None where a run lacks it. ``against_baseline`` has the ratios (``RATIOS``) to
    the method ``baseline`` at the same rate and seed, so at the same arrivals; None for the
    baseline itself, and where it has no such run. In the order of ``records``.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["key"], []).append(record)
    base = {_load_of(r): r for r in records if r["method"] == baseline}
    return {key: _entry(runs, baseline, base) for key, runs in groups.items()}


def _entry(
    runs: Sequence[Mapping[str, Any]],
    baseline: str | None,
    base: Mapping[tuple[Any, ...], Mapping[str, Any]],
) -> dict[str, Any]:
    first = runs[0]
    entry: dict[str, Any] = {
        name: first[name] for name in ("method", "sparsity", "budget_tokens", "effective_sparsity")
    }
    entry |= {
        "request_rate": first["run"]["request_rate"],
        "num_runs": len(runs),
        "not_succeeded": sum(r["counts"]["planned"] - r["counts"]["succeeded"] for r in runs),
        "within_slo": [
            holds(r["summary"]["steady"], r["run"]["slo"]) for r in runs if r["run"]["slo"]
        ],
    }
    for name, read in METRICS.items():
        entry[name] = estimate([read(record) for record in runs])
    pairs = [(r, base[_load_of(r)]) for r in runs if _load_of(r) in base]
    entry["against_baseline"] = None
    if pairs and first["method"] != baseline:
        entry["against_baseline"] = {"baseline": baseline} | {
            name: ratio_estimate(
                [(METRICS[name](run), METRICS[name](other)) for run, other in pairs]
            )
            for name in RATIOS
        }
    return entry


def max_rates(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """By method and budget, the highest tested rate up to which every seed kept the objectives.

    ``first_broken`` is the next tested rate, None where all were kept: the true limit lies between
    the two. ``max_rate`` is None where the lowest rate broke them already.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries.values():
        if entry["request_rate"] is not None and entry["within_slo"]:
            key = f"{entry['method']}_{level(entry['sparsity'], entry['budget_tokens'])}"
            groups.setdefault(key, []).append(entry)
    found: dict[str, Any] = {}
    for key, group in groups.items():
        best = broken = None
        for entry in sorted(group, key=lambda entry: entry["request_rate"]):
            if not all(entry["within_slo"]):
                broken = entry["request_rate"]
                break
            best = entry["request_rate"]
        named = {name: group[0][name] for name in ("method", "sparsity", "budget_tokens")}
        found[key] = {**named, "max_rate": best, "first_broken": broken}
    return found


def _load_of(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """Equal for equal requests at equal times."""
    return record["run"]["request_rate"], record["run"]["seed"]


def _memory(record: Mapping[str, Any], name: str, statistic: str) -> float | None:
    values = record["memory"].get(name)
    return None if values is None else values[statistic]
