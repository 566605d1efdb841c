"""What the authors of a method expected, what was published, what was measured here."""

from __future__ import annotations

from typing import Any

from ..study.expectations import EXPECTATIONS, Expectation
from .cells import change, differs, level, times
from .tables import Row

TOLERANCE = 0.05
"""A run stands beside an expectation whose sparsity is this close to its effective one."""


def expectation_rows(results: dict[str, Any], conditions: str) -> list[Row]:
    """Header and rows for the methods of ``results`` that somebody has claimed something about.

    Args:
        results: ``aggregated_results.json``.
        conditions: under which they were measured, in words.

    """
    table: list[Row] = [
        (
            "method",
            "expected by the authors",
            "published",
            "their conditions",
            "measured here",
            "conditions here",
        ),
    ]
    dense = next((e for e in results.values() if e["method"] == "dense"), None)
    for claim in EXPECTATIONS:
        entries = [(k, e) for k, e in results.items() if e["method"] == claim.method]
        if entries:
            measured = "; ".join(_beside(claim, key, entry, dense) for key, entry in entries)
            table.append(
                (
                    f"{claim.method} ({claim.source})",
                    _expected(claim),
                    claim.published,
                    claim.conditions,
                    measured,
                    conditions,
                )
            )
    return table


def _expected(claim: Expectation) -> str:
    told = [f"sparsity {sparsity}: {bounds}" for sparsity, bounds in claim.bounds.items()]
    return "; ".join([*told, *([_ahead(claim)] if claim.ahead_of else [])]) or "-"


def _ahead(claim: Expectation) -> str:
    """What was expected at every sparsity."""
    titles = {other.method: other.title for other in EXPECTATIONS}
    return f"ahead of {titles[claim.ahead_of]} at the same budget"


def _beside(
    claim: Expectation, key: str, entry: dict[str, Any], dense: dict[str, Any] | None
) -> str:
    """What was measured, or why it stands beside nothing that was expected."""
    name, effective = level(key, entry), entry["effective_sparsity"]
    exact = not differs(entry) and entry["sparsity"] > 0
    shown = name if exact else f"{name} (effective {effective:.3g})"
    if claim.bounds and not any(abs(s - effective) < TOLERANCE + 1e-9 for s in claim.bounds):
        return f"{shown}: left out, nothing was expected at this sparsity"
    return f"{shown}: {_measured(entry, dense)}"


def _measured(entry: dict[str, Any], dense: dict[str, Any] | None) -> str:
    text = f"perplexity {entry['perplexity']['mean']:.2f}"
    if dense is not None:
        text += f" ({change(entry['perplexity']['mean'], dense['perplexity']['mean'])})"
        text += f", {_ratio(entry, dense, 'peak_memory_mib'):.0%} of the KV memory"
        if ratio := entry.get("throughput", {}).get("against_dense"):
            once = " (one load)" if ratio["num_runs"] == 1 else ""
            text += f", {times(ratio, 'x')} throughput{once}"
    return text


def _ratio(entry: dict[str, Any], dense: dict[str, Any], metric: str) -> float:
    return entry[metric]["mean"] / dense[metric]["mean"]
