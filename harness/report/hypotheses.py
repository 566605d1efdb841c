"""The table of a study's hypotheses."""

from __future__ import annotations

from typing import Any

from ..analysis.hypotheses import ALPHA
from .cells import level_shown
from .tables import Row, markdown


def hypothesis_rows(tested: list[dict[str, Any]]) -> list[Row]:
    """Header and rows, one for each hypothesis, point and level."""
    table: list[Row] = [
        (
            "hypothesis",
            "where",
            "sparsity",
            "perplexity",
            "95% interval",
            "last quarter",
            "p (Holm)",
            "verdict",
        )
    ]
    for row in tested:
        interval, p = row["interval"], row["p_holm"]
        table.append(
            (
                row["hypothesis"],
                row["point"] or "-",
                level_shown(row["level"]),
                _percent(row["change"]),
                "-" if interval is None else f"[{_percent(interval[0])}, {_percent(interval[1])}]",
                _percent(row["last_quarter"]),
                "-" if p is None else f"{p:.2g}",
                row["verdict"],
            )
        )
    return table


def hypothesis_parts(tested: list[dict[str, Any]]) -> list[str]:
    """The section of a page; nothing where a study states no hypothesis."""
    if not tested:
        return []
    family = sum(row["p_holm"] is not None for row in tested)
    return [
        "## Hypotheses",
        "Stated in the study's file before it was measured. *Perplexity*: that of the first method "
        "against the second's, or a method's against dense's, over the tokens predicted after the "
        "first eviction of either; *last quarter*: over the last quarter of each window. A "
        f"difference is confirmed, or refuted, below p = {ALPHA:g} after Holm's correction over "
        f"all {family} differences of this table; p is that of a t-test over the means of "
        "clusters (groups of adjacent windows where windows tile a text). A cost is confirmed "
        "where its whole 95% interval lies within the limit, refuted where it lies beyond it, and "
        "else open.",
        markdown(hypothesis_rows(tested)),
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:+.1f}%"
