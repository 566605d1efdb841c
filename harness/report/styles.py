"""How a method looks, everywhere the same: on screen, and printed in grey."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..records.files import replacing

DENSE_POINT = "h"
"""Dense's marker where no line shows it."""
DENSE_STYLE = {"color": "black", "marker": "none", "linestyle": "--"}
_STYLES: dict[str, dict[str, Any]] = {
    # Okabe-Ito colours, distinct to the colour-blind, in steps of lightness; marker and line
    # alone tell the methods apart without any colour.
    "dense": DENSE_STYLE,
    "h2o": {"color": "#0072b2", "marker": "o", "linestyle": "-"},
    "cab": {"color": "#d55e00", "marker": "s", "linestyle": (0, (5, 1))},
    "streaming": {"color": "#009e73", "marker": "^", "linestyle": "-."},
    "random": {"color": "#999999", "marker": "x", "linestyle": ":"},
    "key_norm": {"color": "#cc79a7", "marker": "D", "linestyle": (0, (3, 1, 1, 1, 1, 1))},
}
_OTHERS: list[dict[str, Any]] = [
    {"color": "#56b4e9", "marker": "v", "linestyle": (0, (4, 2))},
    {"color": "#e69f00", "marker": "P", "linestyle": (0, (1, 1))},
    {"color": "#332288", "marker": "*", "linestyle": (0, (6, 2, 1, 2))},
    {"color": "#882255", "marker": "<", "linestyle": (0, (2, 2))},
    {"color": "#44aa99", "marker": ">", "linestyle": (0, (8, 2))},
    {"color": "#aa4499", "marker": "p", "linestyle": (0, (5, 1, 1, 1))},
    {"color": "#661100", "marker": "X", "linestyle": (0, (1, 3))},
    {"color": "#117733", "marker": "H", "linestyle": (0, (7, 1, 3, 1))},
    {"color": "#88ccee", "marker": "d", "linestyle": (0, (2, 1))},
    {"color": "#6699cc", "marker": "8", "linestyle": (0, (9, 3))},
    {"color": "#999933", "marker": "1", "linestyle": (0, (3, 3))},
    {"color": "#b2182b", "marker": "2", "linestyle": (0, (4, 1, 2, 1))},
    {"color": "#4d4d4d", "marker": "3", "linestyle": (0, (6, 3))},
]


def styles(methods: list[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line by method; those without one of their own get the next free."""
    found: dict[str, dict[str, Any]] = {}
    others = [name for name in dict.fromkeys(methods) if name not in _STYLES]
    for name in dict.fromkeys(methods):
        found[name] = _STYLES.get(name) or _OTHERS[others.index(name) % len(_OTHERS)]
    return found


def save(figure: Any, path: Path) -> None:
    """Write ``figure`` as PNG and SVG next to each other, each the same bytes for the same figure.

    Raises:
        UnwritableFile: see ``records.replacing``.

    """
    from matplotlib import pyplot as plt
    from matplotlib import rc_context

    files = {
        "png": {"dpi": 150, "metadata": {"Software": None}},
        "svg": {"metadata": {"Date": None}},
    }
    try:
        with rc_context({"svg.hashsalt": "kv-eviction"}):
            for kind, options in files.items():
                with replacing(path.with_suffix(f".{kind}")) as partial:
                    figure.savefig(partial, format=kind, **options)
    finally:
        plt.close(figure)


def new_figure(width: float = 6.4, height: float = 4.2, **options: Any) -> tuple[Any, Any]:
    """A figure and its axes, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained", **options)


def plain_log_axis(axes: Any) -> None:
    """A logarithmic y axis whose ticks are plain numbers; called when all is drawn.

    It stays linear where nothing drawn is positive: times per token are 0 where all of an answer
    arrives at once.
    """
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    if not math.isfinite(axes.dataLim.minposy):
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    steps = (1, 1.5, 2, 3, 4, 5, 6, 8) if high < 10 * low else (1, 2, 5)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def shared_legend(figure: Any, panels: Any) -> None:
    """One legend below all panels, each method once."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    figure.legend(found.values(), found, loc="outside lower center", ncols=6, fontsize=8)
