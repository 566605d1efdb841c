"""Figures and tables over the comparisons of a study that varies something."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .cells import change, differs, level, level_order, level_title, spread
from .styles import DENSE_POINT, new_figure, save, shared_legend, styles
from .tables import Row

Point = tuple[str, dict[str, Any]]
"""What was varied, in words, and the point's ``aggregated_results.json``."""


def with_metric(points: list[Point], metric: str) -> list[Point]:
    """The points with those entries alone that have ``metric``; [] where a point has none."""
    found = [
        (name, {key: entry for key, entry in results.items() if entry.get(metric) is not None})
        for name, results in points
    ]
    return found if all(results for _, results in found) else []


def task_ablation_rows(points: list[Point]) -> list[Row]:
    """Header and rows: the mean score over tasks of each method and sparsity at every point."""
    return _rows(points, lambda results, key: spread(results[key]["task_score"]))


def ablation_rows(points: list[Point], effective: bool = True) -> list[Row]:
    """Header and rows: perplexity of each method and sparsity at every point.

    Args:
        points: of the study.
        effective: add the effective sparsity, where it is another than was asked for.

    """

    def cell(results: dict[str, Any], key: str) -> str:
        entry, dense = results[key], results.get("dense_s0.0")
        text = spread(entry["perplexity"])
        if dense is not None and entry["method"] != "dense":
            text += f" ({change(entry['perplexity']['mean'], dense['perplexity']['mean'])})"
        if effective and differs(entry):
            text += f" at {entry['effective_sparsity']:.3g}"
        return text

    return _rows(points, cell)


def _rows(points: list[Point], cell: Callable[[dict[str, Any], str], str]) -> list[Row]:
    keys = list(dict.fromkeys(key for _, results in points for key in results))
    table: list[Row] = [("method", "sparsity", *(name for name, _ in points))]
    for key in keys:
        entry = next(results[key] for _, results in points if key in results)
        cells = [cell(results, key) if key in results else "-" for _, results in points]
        sparsity = "-" if entry["method"] == "dense" else level(key, entry)
        table.append((entry["method"], sparsity, *cells))
    return table


def draw_ablation(points: list[Point], path: Path, caption: str, ordered: bool) -> None:
    """Perplexity over the points, a panel per sparsity; bars from the lowest to the highest run.

    Args:
        points: in the order of the figure.
        path: without suffix.
        caption: what the figure was measured on.
        ordered: the points are steps of one quantity, so that lines may join them.

    """
    keys = list(dict.fromkeys(key for _, results in points for key in results))
    entries = {key: next(r[key] for _, r in points if key in r) for key in keys}
    levels = sorted(
        {level(key, entry) for key, entry in entries.items() if entry["method"] != "dense"},
        key=level_order,
    ) or ["-"]
    figure, grid = new_figure(
        max(6.4, 3.6 * len(levels)), 4.2, ncols=len(levels), sharey=True, squeeze=False
    )
    looks = styles([entry["method"] for entry in entries.values()])
    aside = dict.fromkeys(looks, 0.0)
    if not ordered:  # no line tells the methods apart: side by side no marker hides another
        aside = {name: 0.08 * (i - (len(looks) - 1) / 2) for i, name in enumerate(looks)}
        looks = {name: _unjoined(look) for name, look in looks.items()}
    for axes, wanted in zip(grid[0], levels, strict=True):
        for key, entry in entries.items():
            if entry["method"] != "dense" and level(key, entry) != wanted:
                continue
            there = [(i, r[key]["perplexity"]) for i, (_, r) in enumerate(points) if key in r]
            axes.errorbar(
                [i + aside[entry["method"]] for i, _ in there],
                [value["mean"] for _, value in there],
                yerr=[
                    [v["mean"] - v["min"] for _, v in there],
                    [v["max"] - v["mean"] for _, v in there],
                ],
                capsize=3,
                label=entry["method"],
                **looks[entry["method"]],
            )
        names = [textwrap.fill(name, 16, break_long_words=False) for name, _ in points]
        axes.set_xticks(range(len(points)), names, fontsize=7)
        axes.set(title=level_title(wanted), xlim=(-0.4, len(points) - 0.6))
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("perplexity")
    shared_legend(figure, grid[0])
    figure.suptitle("\n".join(textwrap.wrap(caption, 90)), fontsize=8)
    save(figure, path)


def _unjoined(look: dict[str, Any]) -> dict[str, Any]:
    marker = look["marker"] if look["marker"] != "none" else DENSE_POINT
    return {**look, "linestyle": "none", "marker": marker}
