"""Figures of tasks: the score against sparsity or budget, a panel for each; nothing is computed
here."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from ..analysis.estimate import Estimate
from ..records.specifications import DENSE
from .cells import level, level_order
from .level_figures import level_kinds
from .styles import new_figure, save, shared_legend, styles
from .task_tables import tasks_of

MEAN = "mean over tasks"
_COLUMNS = 4
_NAMES = {False: ("tasks", "sparsity"), True: ("tasks_budgets", "budget in tokens")}


def draw_tasks(folder: Path, results: dict[str, Any], caption: str) -> list[tuple[str, str]]:
    """Write the figures there is data for, as PNG and SVG.

    Args:
        folder: where they go.
        results: of ``aggregate_tasks``.
        caption: what they were measured on.

    Returns:
        (name without suffix, what it shows) of each figure.

    """
    if not tasks_of(results) or all(entry["method"] == DENSE for entry in results.values()):
        return []
    made = []
    for budgets in level_kinds(results):
        name, axis = _NAMES[budgets]
        figure = _panels(results, budgets, axis)
        figure.suptitle("\n".join(textwrap.wrap(caption, 110)), fontsize=8)
        save(figure, folder / name)
        made.append(
            (
                name,
                f"Score against {axis}, a panel a task; bars from the lowest to the highest run.",
            )
        )
    return made


def _panels(results: dict[str, Any], budgets: bool, axis: str) -> Any:
    tasks = tasks_of(results)
    shown = [*tasks, MEAN] if len(tasks) > 1 else tasks
    rows = -(-len(shown) // _COLUMNS)
    columns = -(-len(shown) // rows)
    size = max(6.4, 2.9 * columns), 1.2 + 2.5 * rows
    shape = {"ncols": columns, "nrows": rows, "squeeze": False}
    figure, grid = new_figure(*size, **shape, sharex=True, sharey=True)
    panels = list(grid.flat)
    looks = styles([entry["method"] for entry in results.values()])
    width = 1.1 * max(_places(results, budgets).values()) if budgets else 1.0
    # A little apart, so that no bar hides another.
    aside = {name: 0.01 * width * (i - len(looks) / 2) for i, name in enumerate(looks)}
    for axes, task in zip(panels, shown, strict=False):
        for method, points in _lines(results, task, budgets).items():
            look = looks[method]
            if method == DENSE:
                axes.axhline(points[0][1]["mean"], color=look["color"], ls="--", lw=1, label=DENSE)
                continue
            values = [value for _, value in points]
            axes.errorbar(
                [place + aside[method] for place, _ in points],
                [value["mean"] for value in values],
                yerr=[
                    [value["mean"] - value["min"] for value in values],
                    [value["max"] - value["mean"] for value in values],
                ],
                capsize=2,
                ms=4,
                lw=1.2,
                label=method,
                **look,
            )
        axes.set_title(task, fontsize=9)
        axes.set(xlim=(0, width), ylim=(-0.03, 1.03))
        axes.grid(alpha=0.3)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    for axes in panels[max(0, len(shown) - columns) : len(shown)]:
        axes.set_xlabel(axis)
        axes.xaxis.set_tick_params(labelbottom=True)
    for row in grid:
        row[0].set_ylabel("score")
    shared_legend(figure, panels)
    return figure


def _places(results: dict[str, Any], budgets: bool) -> dict[str, float]:
    """Sparsity, or tokens, of the keys that have one."""
    evicting = ((key, entry) for key, entry in results.items() if entry["method"] != DENSE)
    placed = ((key, level_order(level(key, entry))) for key, entry in evicting)
    return {key: place for key, (is_budget, place) in placed if is_budget == budgets}


def _lines(
    results: dict[str, Any], task: str, budgets: bool
) -> dict[str, list[tuple[float, Estimate]]]:
    """Places and scores by method, in order of place; dense's place says nothing."""
    places = _places(results, budgets)
    lines: dict[str, list[tuple[float, Estimate]]] = {}
    for key, entry in results.items():
        value = entry["task_score"] if task == MEAN else entry["tasks"].get(task)
        if value is not None and (key in places or entry["method"] == DENSE):
            lines.setdefault(entry["method"], []).append((places.get(key, 0.0), value))
    return {method: sorted(points, key=lambda p: p[0]) for method, points in lines.items()}
