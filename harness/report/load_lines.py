"""A load's record as lines for a terminal; nothing is computed here."""

from __future__ import annotations

from typing import Any

from ..client.slo import LATENCIES

_COLUMNS = ("mean", "std", "p50", "p90", "p95", "p99")
_UNCOUNTED = "unknown: the server sent no usage"


def load_lines(record: dict[str, Any]) -> list[str]:
    """The figures of a run under their field names."""
    steady = record["summary"]["steady"]
    low, high = steady["span_s"]
    counts = record["counts"]
    lines = [
        "",
        f"{counts['succeeded']} of {counts['planned']} requests succeeded, "
        + ", ".join(
            f"{counts[kind]} {kind.replace('_', ' ')}"
            for kind in ("failed", "timed_out", "incomplete", "not_sent")
        ),
    ]
    lines += [f"  {row['count']} x {row['error']}: {row['message']}" for row in record["failures"]]
    lines += [
        "",
        f"{f'from {low:.1f} to {high:.1f} s':28}" + "".join(f"{c:>10}" for c in _COLUMNS),
    ]
    uncounted = record["output_tokens"]["tokens"] is None
    for name in (*LATENCIES, "send_lag_ms"):
        values = steady[name]
        if values is not None:
            lines.append(f"{name:28}" + "".join(f"{_cell(values[c]):>10}" for c in _COLUMNS))
        elif uncounted and name == "time_per_output_token_ms":
            lines.append(f"{name:28}{_UNCOUNTED}")
    lines.append("")
    unknown = ("output_throughput", *(("goodput",) if record["specification"]["slo"] else ()))
    for name in ("request_throughput", "output_throughput", "goodput", "peak_concurrency"):
        if steady[name] is not None:
            lines.append(f"{name:28}{_cell(steady[name]):>10}")
        elif uncounted and name in unknown:
            lines.append(f"{name:28}{_UNCOUNTED}")
    memory = record["memory"]
    for name in ("kv_cache_usage", "process_memory_mib", "device_memory_mib"):
        if name in memory:
            lines.append(
                f"{name + ' (mean, max)':28}{_cell(memory[name]['mean']):>10}"
                f"{_cell(memory[name]['max']):>10}"
            )
    if memory["evicted_share"] is not None:
        share = memory["kv_eviction_live_share"]
        lines.append(
            f"{'blocks evicted, mean share':28}{_cell(memory['evicted_share']):>10}  held "
            f"{share['mean']:.0%} of the blocks that dense would hold, {share['min']:.0%} at least"
        )
    if "preemptions" in memory:
        lines.append(f"{'preemptions':28}{memory['preemptions']:>10.0f}")
    if quality := record["quality"]:
        value = quality["perplexity"]
        shown = "-" if value is None else f"{value:.3f}"
        left_out = quality["num_other_chunk"] + quality["num_unusable"]
        counted = quality["num_answered"] - left_out
        lines.append(f"{'perplexity under load':28}{shown:>10}  over {counted} windows")
        if quality["num_other_chunk"]:
            chunk = record["specification"]["quality"]["chunk"]
            lines.append(
                f"  {quality['num_other_chunk']} windows left out: the server did not keep to the "
                f"chunk of {chunk} tokens; start it with --long-prefill-token-threshold {chunk} "
                f"and --max-num-batched-tokens of {chunk} times its --max-num-seqs"
            )
        if quality["num_unusable"]:
            lines.append(
                f"  {quality['num_unusable']} windows left out: {quality['unusable'][0]['reason']}"
            )
    return lines + [f"warning: {warning}" for warning in record["warnings"]]


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
