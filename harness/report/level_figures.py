"""Figures of metrics against sparsity, budget and memory; nothing is computed here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..records.specifications import DENSE
from .cells import level, level_order
from .styles import DENSE_POINT, new_figure, styles

_AXES = {
    False: "effective sparsity (share of a window's KV blocks evicted)",
    True: "budget (tokens that a request keeps)",
}


def _methods(results: dict[str, Any]) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Keys and entries by method, ascending in sparsity, then in budget."""
    found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for key, entry in results.items():
        found.setdefault(entry["method"], []).append((key, entry))
    return {m: sorted(pairs, key=lambda p: level_order(level(*p))) for m, pairs in found.items()}


def _bars(value: dict[str, float]) -> tuple[float, float]:
    return value["mean"] - value["min"], value["max"] - value["mean"]


def against_level(
    results: dict[str, Any],
    metric: Callable[[dict[str, Any]], Any],
    label: str,
    from_zero: bool = False,
) -> Any:
    """A panel for sparsities, where points stand at the effective one, and one for budgets."""
    kinds = level_kinds(results)
    figure, grid = new_figure(
        6.4 if len(kinds) == 1 else 9.6, ncols=len(kinds), sharey=True, squeeze=False
    )
    methods = _methods(results)
    looks = styles(list(methods))
    for axes, budgets in zip(grid[0], kinds, strict=True):
        places = {
            key: tokens if budgets else entry["effective_sparsity"]
            for key, entry in results.items()
            for is_budget, tokens in [level_order(level(key, entry))]
            if entry["method"] != DENSE and is_budget == budgets
        }
        width = 1.1 * max(places.values()) if budgets else 1.0
        for i, (method, pairs) in enumerate(methods.items()):
            look = looks[method]
            if method == DENSE:
                value = metric(pairs[0][1])
                axes.axhline(value["mean"], color=look["color"], ls=look["linestyle"], label=method)
                axes.axhspan(value["min"], value["max"], color=look["color"], alpha=0.08, lw=0)
                continue
            there = [(key, metric(entry)) for key, entry in pairs if key in places]
            if not there:
                continue
            # A little apart, so that no bar hides another.
            dodge = 0.008 * width * (i - len(methods) / 2)
            axes.errorbar(
                [places[key] + dodge for key, _ in there],
                [value["mean"] for _, value in there],
                yerr=list(zip(*(_bars(value) for _, value in there), strict=True)),
                capsize=3,
                label=method,
                **look,
            )
        axes.set(xlabel=_AXES[budgets], xlim=(0, width))
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel(label)
    if from_zero:
        grid[0][0].set_ylim(0, 1.08 * grid[0][0].get_ylim()[1])
    grid[0][0].legend()
    return figure


def level_kinds(results: dict[str, Any]) -> list[bool]:
    """Whether there are sparsities (False), budgets (True), or both."""
    evicting = [(key, entry) for key, entry in results.items() if entry["method"] != DENSE]
    return sorted({level_order(level(key, entry))[0] for key, entry in evicting}) or [False]


def against_memory(results: dict[str, Any], front: list[str]) -> Any:
    figure, axes = new_figure()
    methods = _methods(results)
    looks = styles(list(methods))
    tops: dict[str, tuple[float, float]] = {}
    for method, pairs in methods.items():
        look = dict(looks[method])
        if method == DENSE:
            look["marker"] = DENSE_POINT
        x = [entry["peak_memory_mib"] for _, entry in pairs]
        y = [entry["perplexity"] for _, entry in pairs]
        axes.errorbar(
            [value["mean"] for value in x],
            [value["mean"] for value in y],
            xerr=list(zip(*map(_bars, x), strict=True)),
            yerr=list(zip(*map(_bars, y), strict=True)),
            capsize=2,
            label=method,
            **{**look, "linestyle": look["linestyle"] if len(pairs) > 1 else "none"},
        )
        for key, entry in pairs:
            point = entry["peak_memory_mib"]["mean"], entry["perplexity"]["mean"]
            if key in front:
                axes.plot(*point, "o", ms=14, mfc="none", mec="black", mew=0.8)
            if method != DENSE:
                name = level(key, entry)
                tops[name] = max(tops.get(name, point), point, key=lambda place: place[1])
    axes.plot([], [], "o", ms=10, mfc="none", mec="black", mew=0.8, label="Pareto front")
    axes.set(xlabel="peak KV memory, MiB", ylabel="perplexity")
    axes.set_xlim(0, 1.05 * axes.get_xlim()[1])
    for name, top in tops.items():  # once a level: methods lie close to each other there
        right = top[0] > 0.8 * axes.get_xlim()[1]
        axes.annotate(
            name,
            top,
            xytext=(-6 if right else 6, 5),
            fontsize=8,
            ha="right" if right else "left",
            textcoords="offset points",
        )
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
