"""Records of ``kv-eviction load`` side by side, in Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..report.lines import commit_line
from ..report.tables import Row, markdown


def load_table(records: list[dict[str, Any]]) -> str:
    """Records of ``kv-eviction load`` side by side: the steady span, memory and quality."""
    told = [f"{_device(r)}: {commit_line(r)} {_load(r)}" for r in records]
    table: list[Row] = [("measure", *map(_device, records))]
    table += [(name, *map(cell, records)) for name, cell in _LOAD_ROWS.items()]
    return "\n".join(told) + f"\n\n{markdown(table)}"


def _device(record: dict[str, Any]) -> str:
    return "GPU" if "gpu" in record["hardware"] else "CPU"


def _load(record: dict[str, Any]) -> str:
    load, quality = record["specification"], record["specification"]["quality"]
    low, high = record["summary"]["steady"]["span_s"]
    return (
        f"{load['num_requests']} requests, {load['arrivals']} arrivals, "
        f"{load['request_rate']:g} per second, prompts {load['input_length']}, outputs "
        f"{load['output_length']}; of these {quality['share']:.0%} are windows of "
        f"{quality['context_length']} tokens, chunk {quality['chunk']}. Steady span: second "
        f"{low:.0f} to {high:.0f}."
    )


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _steady(name: str, *statistics: str) -> Callable[[dict[str, Any]], str]:
    """What fills a cell with a metric of the steady span, or with some of its statistics."""

    def cell(record: dict[str, Any]) -> str:
        value = record["summary"]["steady"][name]
        if value is None or not statistics:
            return _number(value)
        return " / ".join(_number(value[statistic]) for statistic in statistics)

    return cell


def _succeeded(record: dict[str, Any]) -> str:
    return f"{record['counts']['succeeded']} of {record['counts']['planned']}"


def _held(record: dict[str, Any]) -> str:
    usage = record["memory"]["kv_cache_usage"]
    return f"{usage['mean']:.1%} / {usage['max']:.1%}"


def _evicted(record: dict[str, Any]) -> str:
    value = record["memory"]["evicted_share"]
    return "-" if value is None else f"{value:.3f}"


def _perplexity(record: dict[str, Any], name: str) -> str:
    value = record["quality"][name]
    return "-" if value is None else f"{value:.2f}"


def _windows(record: dict[str, Any]) -> str:
    quality = record["quality"]
    return f"{quality['num_answered']} of {quality['num_asked']} / {quality['num_other_chunk']}"


_LOAD_ROWS: dict[str, Callable[[dict[str, Any]], str]] = {
    "requests that succeeded": _succeeded,
    "time to first token, ms, p50 / p99": _steady("time_to_first_token_ms", "p50", "p99"),
    "time per output token, ms, p50 / p95": _steady("time_per_output_token_ms", "p50", "p95"),
    "requests per second": _steady("request_throughput"),
    "output tokens per second": _steady("output_throughput"),
    "requests in flight at the peak": _steady("peak_concurrency"),
    "sent late, ms, p50 / p99": _steady("send_lag_ms", "p50", "p99"),
    "KV pool, blocks": lambda r: f"{r['memory']['num_gpu_blocks']:.0f}",
    "KV pool held, mean / max": _held,
    "blocks evicted, mean share": _evicted,
    "preemptions": lambda r: f"{r['memory']['preemptions']:.0f}",
    "perplexity under load": lambda r: _perplexity(r, "perplexity"),
    "perplexity after eviction": lambda r: _perplexity(r, "perplexity_after_eviction"),
    "windows answered / chunk not kept": _windows,
}
