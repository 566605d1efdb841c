"""Cells that the tables of batches and of steady loads share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .cells import times


def speed(entry: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    """Output tokens per second, of stock, by seed, what the roofline allows, what is reached."""
    median, ratio = entry["median_output_tokens_per_second"], entry["median_against_stock"]
    bound = entry["roofline"]
    return (
        f"{median:.0f}" if median >= 100 else f"{median:#.3g}",
        "-" if ratio is None else _ratio(ratio),
        times(entry["against_stock"], "x", 3) if entry["num_runs"] > 1 else "-",
        "-" if bound is None else f"{bound:.2f}x",
        "-" if bound is None or ratio is None else f"{100 * ratio / bound:.0f}%",
    )


def budget(entry: Mapping[str, Any]) -> str:
    """What a row's requests may keep, and what that comes to where it is another number."""
    effective = entry["effective_sparsity"]
    if entry["budget_tokens"] is not None:
        if effective is None:
            return f"{entry['budget_tokens']:,} tokens"
        return f"{entry['budget_tokens']:,} tokens ({effective:.3g})" if effective else "0"
    asked = f"{entry['sparsity']:g}"
    alike = effective is None or asked == f"{effective:.3g}"
    return asked if alike else f"{asked} ({effective:.3g})"


def _ratio(value: float) -> str:
    return f"{value:.2f}x" if value > 1.2 else f"{value:.3f}x"
