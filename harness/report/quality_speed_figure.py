"""A figure of what configurations cost beside what they gain. It draws and computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..analysis.quality_speed import Joined, Point
from .cells import level_shown
from .styles import new_figure, save, shared_legend, styles

_FRONT = {"color": "#aaaaaa", "linewidth": 3, "drawstyle": "steps-pre", "zorder": 0}
"""A step: who asks for more speed, or for less memory, pays what the next configuration costs."""
_MARKER, _GAP, _HEIGHT, _CHARACTER = 8.0, 7.0, 9.0, 5.0
"""Sizes in typographic points: a marker, its distance from a label, a label, a character of it."""
_PLACES = [(side, lift) for lift in (7, -7, 14, -14, 21, -21) for side in (1, -1)]
"""Where a label may stand: right or left of its point, and lifted by so many points."""


def draw_quality_speed(joined: Joined, path: Path) -> None:
    """Change of perplexity against throughput, and against KV memory, as PNG and SVG.

    Args:
        joined: configurations, at least one.
        path: without suffix.

    """
    points = joined.points
    figure, (speed, memory) = new_figure(9.6, 4.8, ncols=2, sharey=True)
    looks = styles([point.method for point in points])
    budgets = any(point.level.startswith("b") for point in points)
    labels = f"(numbers: sparsity{' or budget' if budgets else ''})"
    for axes, place in ((speed, _ratio), (memory, _share)):
        _configurations(axes, points, looks, place)
    on_speed = [_at(point, _ratio) for point in points if point.on_speed_front]
    on_memory = [_at(point, _share) for point in points if point.on_memory_front]
    _front(speed, sorted(on_speed), (1.0, 0.0), joined.reference_on_speed_front)
    _front(memory, sorted(on_memory, reverse=True), (100.0, 0.0), joined.reference_on_memory_front)
    speed.set(
        title=f"quality and speed {labels}",
        xlabel="output throughput (times stock vLLM's)",
        ylabel="perplexity after the first eviction (% above dense)",
    )
    memory.set(
        title=f"quality and memory {labels}",
        xlabel="KV memory of a request, mean over its steps (% of dense's)",
    )
    memory.set_xlim(108, 0)  # what is better lies to the right, as on the other panel
    shared_legend(figure, (speed, memory))
    figure.canvas.draw()
    for axes, place in ((speed, _ratio), (memory, _share)):
        _label(axes, points, looks, place)
    save(figure, path)


def _ratio(point: Point) -> tuple[float, float, float]:
    """Value and bounds; without an interval the value is its own bounds."""
    return point.speed["mean"], point.speed["low"], point.speed["high"]


def _share(point: Point) -> tuple[float, float, float]:
    return (100 * point.memory_share,) * 3


def _cost(point: Point) -> tuple[float, float, float]:
    value, low, high = point.change
    return (
        100 * value,
        100 * (value if low is None else low),
        100 * (value if high is None else high),
    )


_Place = Callable[[Point], tuple[float, float, float]]


def _at(point: Point, place: _Place) -> tuple[float, float]:
    return place(point)[0], _cost(point)[0]


def _configurations(
    axes: Any, points: Sequence[Point], looks: dict[str, dict[str, Any]], place: _Place
) -> None:
    for method in dict.fromkeys(point.method for point in points):
        shown = [point for point in points if point.method == method]
        x, y = [place(point) for point in shown], [_cost(point) for point in shown]
        axes.errorbar(
            [value for value, _, _ in x],
            [value for value, _, _ in y],
            xerr=_bars(x) if place is _ratio else None,
            yerr=_bars(y),
            capsize=2,
            elinewidth=0.8,
            ms=7,
            label=method,
            **{**looks[method], "linestyle": "none"},
        )
    axes.axhline(0, color="black", linestyle="--", linewidth=0.8)
    axes.grid(alpha=0.3)


def _front(
    axes: Any,
    front: Sequence[tuple[float, float]],
    reference: tuple[float, float],
    with_reference: bool,
) -> None:
    """The front's configurations, from the one that gains least on, and what gains nothing."""
    steps = [reference, *front] if with_reference else front
    axes.plot(*zip(*steps, strict=True), label="Pareto front", **_FRONT)
    axes.plot(*reference, "kX", ms=8, label="stock, dense", linestyle="none")


def _bars(values: Sequence[tuple[float, float, float]]) -> list[list[float]]:
    return [
        [value - low for value, low, _ in values],
        [high - value for value, _, high in values],
    ]


def _label(
    axes: Any, points: Sequence[Point], looks: dict[str, dict[str, Any]], place: _Place
) -> None:
    """Each point's sparsity or budget, where it hides no marker and no other label."""
    scale = axes.figure.dpi / 72
    markers = [tuple(axes.transData.transform(_at(point, place)) / scale) for point in points]
    taken = [_box(x, y, _MARKER, _MARKER) for x, y in markers]
    for point, (x, y) in zip(points, markers, strict=True):
        text = level_shown(point.level)
        width = _CHARACTER * len(text)
        boxes = [_box(x + dx * (width / 2 + _GAP), y + dy, width, _HEIGHT) for dx, dy in _PLACES]
        free = [box for box in boxes if not any(_overlap(box, other) for other in taken)]
        chosen = (free or boxes)[0]
        taken.append(chosen)
        left, bottom, right, top = chosen
        axes.annotate(
            text,
            _at(point, place),
            xytext=((left + right) / 2 - x, (bottom + top) / 2 - y),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            color=looks[point.method]["color"],
            bbox={
                "boxstyle": "square,pad=0.05",
                "facecolor": "white",
                "linewidth": 0,
                "alpha": 0.8,
            },
        )


def _box(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    """Left, bottom, right and top of what is centred at ``x`` and ``y``, in typographic points."""
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
