"""Figures of a serving study, from aggregated entries and records; nothing is computed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..records.specifications import DENSE, STOCK
from .styles import new_figure, plain_log_axis, save, shared_legend, styles

Entry = Mapping[str, Any]


def draw_serving(
    entries: Sequence[Entry], records: Sequence[Mapping[str, Any]], folder: Path
) -> list[tuple[str, str]]:
    """Draw what the data allow; ``[(file stem, what it shows)]``."""
    rates = {entry["request_rate"] for entry in entries}
    shown = []
    if len(rates) > 1:
        shown += [
            (_latency(entries, folder), "Latency against request rate"),
            (_goodput(entries, folder), "Goodput and throughput against request rate"),
        ]
    elif len(entries) > 1:
        shown.append((_bars(entries, folder), "Methods side by side"))
    if len(entries) > 1:
        shown.append((_throughput(entries, folder), "Output throughput against sparsity"))
    shown.append((_memory(records, folder), "KV pool and batch over time, first seed"))
    if any(entry["perplexity"] for entry in entries):
        shown.append((_pareto(entries, folder), "KV memory against perplexity at equal load"))
    return shown


def label(entry: Entry) -> str:
    """How figures and tables name a method at its sparsity or budget."""
    method = entry["method"]
    if entry.get("budget_tokens") is not None:
        return f"{method} {entry['budget_tokens']:,} tokens"
    return method if method in (DENSE, STOCK) else f"{method} {entry['sparsity']:g}"


def _by_label(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(label(entry), []).append(entry)
    return groups


def _styles(entries: Sequence[Entry]) -> dict[str, dict[str, Any]]:
    """By label: the method's style; further sparsities of a method are fainter."""
    base = styles([entry["method"] for entry in entries])
    found: dict[str, dict[str, Any]] = {}
    for name, group in _by_label(entries).items():
        method = group[0]["method"]
        sparsities = sorted({e["sparsity"] for e in entries if e["method"] == method})
        faint = len(sparsities) - 1 - sparsities.index(group[0]["sparsity"])
        found[name] = {**base[method], "alpha": max(0.35, 1 - 0.4 * faint)}
    return found


def _line(axes: Any, group: Sequence[Entry], metric: str, name: str, style: Any) -> None:
    points = sorted(
        (e["request_rate"], e[metric]) for e in group if e[metric] and e["request_rate"] is not None
    )
    if not points:
        return
    x = [rate for rate, _ in points]
    y = [value["mean"] for _, value in points]
    errors = [[v["mean"] - v["low"] for _, v in points], [v["high"] - v["mean"] for _, v in points]]
    many = any(value["num_runs"] > 1 for _, value in points)
    axes.errorbar(x, y, yerr=errors if many else None, capsize=3, label=name, **style)


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def _latency(entries: Sequence[Entry], folder: Path) -> str:
    panels = {
        "time_to_first_token_ms.p50": "median time to first token, ms",
        "time_to_first_token_ms.p99": "p99 time to first token, ms",
        "time_per_output_token_ms.p95": "p95 time per output token, ms",
        "end_to_end_latency_ms.p50": "median end-to-end latency, ms",
    }
    figure = _panels(entries, panels, log=True)
    save(figure, folder / "latency")
    return "latency"


def _goodput(entries: Sequence[Entry], folder: Path) -> str:
    panels = {"output_throughput": "output tokens per second"}
    if any(entry["goodput"] for entry in entries):
        panels = {"goodput": "goodput, requests per second", **panels}
    figure = _panels(entries, panels, log=False)
    save(figure, folder / "goodput")
    return "goodput"


def _panels(entries: Sequence[Entry], panels: Mapping[str, str], log: bool) -> Any:
    rows = -(-len(panels) // 2)
    figure, grid = new_figure(
        9.6, 0.6 + 3.4 * rows, nrows=rows, ncols=min(2, len(panels)), squeeze=False
    )
    style = _styles(entries)
    for axes, (metric, title) in zip(grid.flat, panels.items(), strict=False):
        for name, group in _by_label(entries).items():
            _line(axes, group, metric, name, style[name])
        axes.set_xlabel("request rate, per second")
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        if log:
            plain_log_axis(axes)
    shared_legend(figure, grid.flat)
    return figure


def _bars(entries: Sequence[Entry], folder: Path) -> str:
    panels = {
        "output_throughput": "output tokens per second",
        "mean_concurrency": "requests in the batch (mean)",
        "time_to_first_token_ms.p50": "median time to first token, ms",
        "time_per_output_token_ms.p50": "median time per output token, ms",
        "kv_mib_per_request": "KV memory per request, MiB",
        "end_to_end_latency_ms.p50": "median end-to-end latency, ms",
    }
    figure, grid = new_figure(9.6, 6.4, nrows=2, ncols=3)
    style = _styles(entries)
    for axes, (metric, title) in zip(grid.flat, panels.items(), strict=True):
        for place, entry in enumerate(entries):
            value, look = entry[metric], style[label(entry)]
            if value is None:
                continue
            axes.bar(place, value["mean"], color=look["color"], alpha=0.75 * look["alpha"])
            if value["num_runs"] > 1:
                axes.errorbar(
                    place,
                    value["mean"],
                    capsize=5,
                    color="black",
                    yerr=[[value["mean"] - value["low"]], [value["high"] - value["mean"]]],
                )
        axes.set_xticks(range(len(entries)), [label(entry) for entry in entries], fontsize=8)
        axes.set_ylim(bottom=0)
        axes.set_title(title, fontsize=9)
        axes.grid(axis="y", alpha=0.3)
    save(figure, folder / "methods")
    return "methods"


def _common_rate(runs: Sequence[Mapping[str, Any]]) -> float | None:
    """The highest request rate that every method and sparsity was measured at; None without."""
    rates: dict[str, set[float]] = {}
    for run in runs:
        if run["request_rate"] is not None:
            rates.setdefault(label(run), set()).add(run["request_rate"])
    return max(set.intersection(*rates.values()), default=None) if rates else None


def _throughput(entries: Sequence[Entry], folder: Path) -> str:
    """At the highest rate that all have, where a server has most to do."""
    rate = _common_rate(entries)
    chosen = [
        entry
        for entry in entries
        if entry["request_rate"] == rate and entry.get("budget_tokens") is None
    ]
    figure, axes = new_figure()
    look = styles([entry["method"] for entry in chosen])
    for method, style in look.items():
        group = sorted((e for e in chosen if e["method"] == method), key=lambda e: e["sparsity"])
        values = [entry["output_throughput"] for entry in group]
        if not all(values):
            continue
        if method in (DENSE, STOCK):
            axes.axhline(
                values[0]["mean"], label=method, color=style["color"], linestyle=style["linestyle"]
            )
            axes.axhspan(values[0]["low"], values[0]["high"], color=style["color"], alpha=0.08)
            continue
        means = [value["mean"] for value in values]
        spread = [[v["mean"] - v["low"] for v in values], [v["high"] - v["mean"] for v in values]]
        many = any(value["num_runs"] > 1 for value in values)
        axes.errorbar(
            [e["sparsity"] for e in group],
            means,
            yerr=spread if many else None,
            capsize=3,
            label=method,
            **style,
        )
    axes.set_xlabel("sparsity (share of KV blocks evicted)")
    axes.set_ylabel("output tokens per second")
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    _legend(axes)
    if rate is not None:
        axes.set_title(f"request rate {rate:g} per second", fontsize=9)
    save(figure, folder / "throughput")
    return "throughput"


def _memory(records: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """One run per method and sparsity: first seed, the highest rate that all of them have."""
    seed = records[0]["run"]["seed"]
    mine = [record for record in records if record["run"]["seed"] == seed]
    rate = _common_rate([record["run"] for record in mine])
    chosen = [record for record in mine if record["run"]["request_rate"] == rate]
    style = _styles([record["run"] for record in records])
    panels = {
        "kv_cache_usage": "share of the KV pool held",
        "num_requests_running": "requests in the batch",
        "num_requests_waiting": "requests waiting",
    }
    figure, grid = new_figure(9.6, 3.6, ncols=3)
    for axes, (name, title) in zip(grid.flat, panels.items(), strict=True):
        for record in chosen:
            samples = record["samples"]
            if name not in samples:
                continue
            look = {**style[label(record["run"])], "marker": "none"}
            times = samples.get(f"{name}_time_s", samples["time_s"])
            axes.plot(times, samples[name], label=label(record["run"]), **look)
        axes.set_xlabel("seconds")
        axes.set_title(title, fontsize=9)
        axes.set_ylim(bottom=0, top=None if axes.dataLim.ymax > 0 else 1)
        axes.grid(alpha=0.3)
    if rate is not None:
        grid.flat[0].set_ylabel(f"at {rate:g} requests/s")
    shared_legend(figure, grid.flat)
    save(figure, folder / "kv_memory")
    return "kv_memory"


def _pareto(entries: Sequence[Entry], folder: Path) -> str:
    figure, axes = new_figure()
    style = _styles(entries)
    for entry in entries:
        memory, quality = entry["kv_mib_per_request"], entry["perplexity"]
        if not memory or not quality:
            continue
        look = style[label(entry)]
        marker = "*" if look["marker"] == "none" else look["marker"]
        axes.errorbar(
            memory["mean"],
            quality["mean"],
            color=look["color"],
            marker=marker,
            linestyle="none",
            alpha=look["alpha"],
            capsize=3,
            label=label(entry),
            xerr=[[memory["mean"] - memory["low"]], [memory["high"] - memory["mean"]]],
            yerr=[[quality["mean"] - quality["low"]], [quality["high"] - quality["mean"]]],
        )
    axes.set_xlabel("KV memory per request in the batch, MiB")
    axes.set_ylabel("perplexity under load")
    axes.grid(alpha=0.3)
    _legend(axes)
    save(figure, folder / "memory_perplexity")
    return "memory_perplexity"
