"""Figures of one comparison. They draw what is there and compute nothing but log scales."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..records.specifications import DENSE
from .cells import level, level_order, level_shown, level_title
from .level_figures import against_level, against_memory, level_kinds
from .styles import new_figure, save, shared_legend, styles

_LEVELS = {False: "sparsity", True: "budget"}


def draw(
    folder: Path,
    results: dict[str, Any],
    tests: dict[str, Any],
    curves: dict[str, Any],
    caption: str,
) -> list[tuple[str, str]]:
    """Write every figure there is data for, as PNG and SVG.

    Returns:
        (name without suffix, what it shows) of each figure, in the order of a report.

    """
    levels = " and ".join(_LEVELS[budgets] for budgets in level_kinds(results))
    figures: list[tuple[str, str, Callable[[], Any] | None]] = [
        (
            "perplexity",
            f"Perplexity against {levels}; bars from the lowest to the highest run.",
            lambda: against_level(results, lambda e: e["perplexity"], "perplexity"),
        ),
        (
            "throughput",
            f"Output tokens per second against {levels} under the saturating load; bars from the "
            "lowest to the highest run.",
            (
                lambda: against_level(
                    {k: e for k, e in results.items() if "throughput" in e},
                    lambda e: e["throughput"]["output_tokens_per_second"],
                    "output tokens per second",
                    from_zero=True,
                )
            )
            if any("throughput" in e for e in results.values())
            else None,
        ),
        (
            "memory",
            "Peak KV memory against perplexity; ringed: no other point is better in both.",
            lambda: against_memory(results, curves["pareto"]),
        ),
        (
            "position",
            "Loss by position, difference from dense on the same windows; bands: 95% over windows "
            "that share no token. Each panel has a scale of its own.",
            (lambda: _position(results, curves["nll_by_position"]))
            if any("difference" in c for c in curves["nll_by_position"].values())
            else None,
        ),
        (
            "cache",
            "KV blocks per window after so many tokens, first windows in flight of the first run.",
            (lambda: _cache(results, curves["cache"])) if curves["cache"] else None,
        ),
        (
            "differences",
            "Differences in loss with 95% intervals: thin by the bootstrap over seeds, thick by "
            "Student's t over windows; filled: significant after Holm's correction (paired t-test, "
            "5%).",
            (lambda: _forest(tests)) if any(_drawable(t) for t in tests.values()) else None,
        ),
    ]
    made = []
    for name, text, function in figures:
        if function is not None:
            figure = function()
            figure.suptitle("\n".join(textwrap.wrap(caption, 90)), fontsize=8)
            save(figure, folder / name)
            made.append((name, text))
    return made


def _position(results: dict[str, Any], positions: dict[str, Any]) -> Any:
    shown = {key: results[key] for key, curve in positions.items() if "difference" in curve}
    levels = sorted({level(key, entry) for key, entry in shown.items()}, key=level_order)
    figure, grid = new_figure(max(6.4, 3.6 * len(levels)), 3.8, ncols=len(levels), squeeze=False)
    looks = styles([entry["method"] for entry in results.values()])
    for axes, wanted in zip(grid[0], levels, strict=True):
        for key, entry in shown.items():
            if level(key, entry) != wanted:
                continue
            look, curve = looks[entry["method"]], positions[key]
            axes.plot(
                curve["queries"],
                curve["difference"],
                color=look["color"],
                ls=look["linestyle"],
                marker=look["marker"],
                ms=4,
                lw=1.2,
                markevery=max(1, len(curve["queries"]) // 8),
                label=entry["method"],
            )
            axes.fill_between(
                curve["queries"], curve["low"], curve["high"], color=look["color"], alpha=0.12, lw=0
            )
        axes.axhline(0, color="black", ls="--", lw=1, label=DENSE)
        axes.set(title=level_title(wanted), xlabel="token of the window")
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("loss above dense, nats per token")
    shared_legend(figure, grid[0])
    return figure


def _cache(results: dict[str, Any], traces: dict[str, Any]) -> Any:
    evicting = [key for key in traces if results[key]["method"] != DENSE]
    levels = sorted({level(key, results[key]) for key in evicting}, key=level_order)
    figure, grid = new_figure(
        max(6.4, 3.6 * len(levels)), 3.8, ncols=max(1, len(levels)), sharey=True, squeeze=False
    )
    looks = styles([entry["method"] for entry in results.values()])
    for axes, wanted in zip(grid[0], levels or [""], strict=True):
        width = 3.0
        for key, trace in traces.items():
            method = results[key]["method"]
            if method != DENSE and level(key, results[key]) != wanted:
                continue
            look = looks[method]
            axes.plot(
                trace["tokens"],
                trace["blocks"],
                color=look["color"],
                ls=look["linestyle"],
                marker=look["marker"],
                ms=4,
                lw=width,
                label=method,
                markevery=max(1, len(trace["tokens"]) // 8),
            )
            width = max(1.0, width - 0.5)  # what lies on top is thinner: nothing hides another
        axes.set(title=level_title(wanted) if wanted else "", xlabel="tokens processed")
        axes.grid(alpha=0.3)
    grid[0][0].set_ylim(bottom=0)  # after all are drawn: the limits are shared, and now fixed
    grid[0][0].set_ylabel("KV blocks per window")
    shared_legend(figure, grid[0])
    return figure


def _drawable(test: dict[str, Any]) -> bool:
    return test["all_tokens"]["interval_95"] is not None


def _forest(tests: dict[str, Any]) -> Any:
    """A row per comparison, those of a sparsity or budget together, most evicted last."""
    drawn = []
    for comparison, test in tests.items():
        if _drawable(test):
            pair, _, name = comparison.rpartition("_")
            drawn.append((pair.replace("_vs_", " vs "), level_shown(name), test))
    drawn.sort(key=lambda row: level_order(row[1]))
    drawn.reverse()  # row 0 is at the bottom
    figure, axes = new_figure(6.4, 1.8 + 0.27 * len(drawn))
    labels = []
    for row, (pair, name, test) in enumerate(drawn):
        result = test["all_tokens"]
        p = result["paired_t_p_holm"]
        filled = p is not None and p < 0.05
        first = row == 0
        axes.plot(
            result["interval_95_t"],
            [row, row],
            color="0.65",
            lw=7,
            solid_capstyle="butt",
            label="95% by windows" if first else None,
        )
        axes.plot(
            result["interval_95"],
            [row, row],
            color="black",
            lw=1,
            marker="|",
            ms=6,
            label="95% by seeds" if first else None,
        )
        axes.plot(
            result["mean_difference_nats"],
            row,
            "o",
            ms=4,
            mec="black",
            mfc="black" if filled else "white",
        )
        if row and name != drawn[row - 1][1]:
            axes.axhline(row - 0.5, color="0.8", lw=0.8)
        labels.append(f"{pair}, {name}")
    for face, text in (("black", "p < 0.05, Holm"), ("white", "not so")):
        axes.plot([], [], "o", ms=4, mec="black", mfc=face, label=text)
    axes.axvline(0, color="black", ls="--", lw=0.8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(-0.7, len(labels) - 0.3)
    axes.set(xlabel="second minus first, nats per token (right of 0: the first is better)")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return figure
