"""A figure of many methods on a few texts: what each costs against dense, a row a method."""

from __future__ import annotations

import textwrap
from pathlib import Path

from .ablation import Point
from .cells import level, level_order, level_title
from .styles import new_figure, save, shared_legend

MANY = 8
"""More methods than this do not fit beside each other above every text."""
_MARKERS = ("o", "s", "^", "D", "v", "P")
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")


def is_for(points: list[Point]) -> bool:
    """Whether this figure shows the points of a study better than one with perplexities would."""
    methods = {entry["method"] for _, results in points for entry in results.values()}
    has_dense = all("dense_s0.0" in results for _, results in points)
    return has_dense and len(methods) > MANY and len(points) <= len(_MARKERS)


def draw_changes(points: list[Point], path: Path, caption: str) -> None:
    """Change of perplexity against dense over whole windows, in percent, a panel per sparsity.

    Args:
        points: what was varied, in words, and aggregated results; ``is_for`` holds.
        path: without suffix.
        caption: what the figure was measured on.

    """
    entries = {k: e for _, r in points for k, e in r.items() if e["method"] != "dense"}
    levels = sorted({level(k, e) for k, e in entries.items()}, key=level_order)
    methods = list(dict.fromkeys(entry["method"] for entry in entries.values()))
    width, height = max(6.4, 3.8 * len(levels)), 1.6 + 0.24 * len(methods)
    figure, grid = new_figure(width, height, ncols=len(levels), sharey=True, squeeze=False)
    for axes, wanted in zip(grid[0], levels, strict=True):
        for (name, results), marker, colour in zip(points, _MARKERS, _COLOURS, strict=False):
            dense = results["dense_s0.0"]["perplexity"]["mean"]
            shown = [e for k, e in results.items() if k in entries and level(k, e) == wanted]
            axes.plot(
                [100 * (e["perplexity"]["mean"] / dense - 1) for e in shown],
                [methods.index(e["method"]) for e in shown],
                marker=marker,
                color=colour,
                linestyle="none",
                label=name,
            )
        axes.axvline(0, color="black", linestyle="--", linewidth=1)
        axes.set(title=level_title(wanted), xlabel="% of dense's perplexity")
        axes.set_yticks(range(len(methods)), methods, fontsize=8)
        axes.grid(alpha=0.3)
    grid[0][0].invert_yaxis()
    shared_legend(figure, grid[0])
    figure.suptitle("\n".join(textwrap.wrap(caption, 90)), fontsize=8)
    save(figure, path)
