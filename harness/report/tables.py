"""Tables from aggregated results; nothing is computed here but ratios."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .cells import change, differs, level, spread, times

Row = tuple[str, ...]
_MEASURED = (
    "perplexity",
    "vs dense",
    "after eviction",
    "vs dense",
    "KV peak MiB",
    "blocks/window",
)
EFFECTIVE = (
    "*Effective*: the sparsity that is left of what was asked, as blocks are whole and at least "
    "`min_blocks` of them stay."
)


def result_rows(results: dict[str, Any], effective: bool = True) -> list[Row]:
    """Header and rows of the main table, in the order of ``results``.

    Args:
        results: ``aggregated_results.json``.
        effective: show the effective sparsity, where a row's is another than was asked for.

    """
    effective = effective and any(map(differs, results.values()))
    dense = next(
        (e["perplexity"]["mean"] for e in results.values() if e["method"] == "dense"), None
    )
    table: list[Row] = [(*head(effective), *_MEASURED)]
    for key, entry in results.items():
        ppl, after = entry["perplexity"]["mean"], entry["perplexity_after_eviction"]
        base = entry.get("dense_after_eviction")
        is_dense = entry["method"] == "dense"
        table.append(
            (
                *asked(key, entry, effective),
                spread(entry["perplexity"]),
                "-" if is_dense or dense is None else change(ppl, dense),
                "-" if after is None else spread(after),
                "-" if after is None or base is None else change(after["mean"], base["mean"]),
                f"{entry['peak_memory_mib']['mean']:.1f}",
                f"{entry['avg_cache_size']['mean']:.1f}",
            )
        )
    return table


def throughput_rows(results: dict[str, Any]) -> list[Row]:
    """Header and rows of the throughput pass; only the keys it was run for."""
    effective = any(map(differs, results.values()))
    table: list[Row] = [
        (
            *head(effective),
            "prefill tok/s",
            "decode tok/s",
            "output tok/s",
            "vs dense",
            "KV peak MiB",
            "preemptions",
            "blocks evicted",
            "decisions s",
        ),
    ]
    for key, entry in results.items():
        if "throughput" not in entry:
            continue
        load = entry["throughput"]
        table.append(
            (
                *asked(key, entry, effective),
                spread(load["prefill_tokens_per_second"], 0),
                spread(load["decode_tokens_per_second"], 0),
                spread(load["output_tokens_per_second"], 0),
                times(load["against_dense"]),
                f"{load['peak_memory_mib']['mean']:.0f}",
                f"{load['preemptions']['mean']:.0f}",
                f"{load['blocks_evicted']['mean']:.0f}",
                f"{load['decision_seconds']['mean']:.2f}",
            )
        )
    return table


def normalised_rows(results: dict[str, Any]) -> list[Row]:
    """Header and rows of the measures that do not depend on the tokenizer."""
    effective = any(map(differs, results.values()))
    table: list[Row] = [(*head(effective), "word perplexity", "byte perplexity", "bits/byte")]
    for key, entry in results.items():
        if entry.get("bits_per_byte") is None:
            continue
        table.append(
            (
                *asked(key, entry, effective),
                spread(entry["word_perplexity"]),
                spread(entry["byte_perplexity"], 4),
                spread(entry["bits_per_byte"], 4),
            )
        )
    return table


def test_rows(tests: dict[str, Any], part: str) -> list[Row]:
    """Header and rows of the significance tests; ``part``: ``all_tokens`` or ``after_eviction``."""
    table: list[Row] = [
        (
            "comparison",
            "difference (nats)",
            "95% by seeds",
            "95% by windows",
            "d_z",
            "t p",
            "t p (Holm)",
            "Wilcoxon p",
            "Wilcoxon p (Holm)",
            "detectable",
            "windows",
        ),
    ]
    for name, test in tests.items():
        result = test[part]
        if result is None:
            continue
        table.append(
            (
                name,
                f"{result['mean_difference_nats']:+.4f}",
                _range(result["interval_95"]),
                _range(result["interval_95_t"]),
                _number(result["effect_size_dz"], "+.2f"),
                _number(result["paired_t_p"], ".2g"),
                _number(result["paired_t_p_holm"], ".2g"),
                _number(result["wilcoxon_p"], ".2g"),
                _number(result["wilcoxon_p_holm"], ".2g"),
                _number(result["minimal_detectable_difference"], ".4f"),
                str(result["num_windows"]),
            )
        )
    return table


def markdown_table(results: dict[str, Any]) -> str:
    """The main table for a README, by the sparsities that were asked for."""
    return markdown(result_rows(results, effective=False))


def aligned(table: Sequence[Row]) -> str:
    """A header and rows in columns of spaces."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = []
    for n, row in enumerate(table):
        cells = [
            cell.ljust(widths[i]) if i == 0 else cell.rjust(widths[i]) for i, cell in enumerate(row)
        ]
        lines.append("  ".join(cells))
        if n == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)


def markdown(table: Sequence[Row], numbers: bool = True) -> str:
    """A header and rows in Markdown, numbers to the right."""
    column = "---:|" if numbers else "---|"
    lines = ["| " + " | ".join(table[0]) + " |", "|---|" + column * (len(table[0]) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in table[1:]]
    return "\n".join(lines)


def head(effective: bool) -> Row:
    """The header of the cells that say what a row is."""
    return ("method", "sparsity", "effective") if effective else ("method", "sparsity")


def asked(key: str, entry: dict[str, Any], effective: bool) -> Row:
    """The cells that say what a row is, as ``head`` has them."""
    if entry["method"] == "dense":
        return (entry["method"], "-", "-") if effective else (entry["method"], "-")
    shown = (entry["method"], level(key, entry))
    return (*shown, f"{entry['effective_sparsity']:.3g}") if effective else shown


def _range(value: list[float] | None) -> str:
    return "-" if value is None else f"[{value[0]:+.4f}, {value[1]:+.4f}]"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
