"""Figures as the cells of tables tell them; nothing is computed here but ratios."""

from __future__ import annotations

from typing import Any

from ..analysis.change import Interval
from ..analysis.estimate import Estimate


def differs(entry: dict[str, Any]) -> bool:
    """Whether a reader must be told the effective sparsity of an entry of aggregated results.

    A budget in tokens is told as such: it names no sparsity that could be another.
    """
    asked = entry["sparsity"]
    if entry["effective_sparsity"] is None:  # requests differ in length
        return False
    return asked > 0 and f"{entry['effective_sparsity']:.3f}" != f"{asked:.3f}"


def level(key: str, entry: dict[str, Any]) -> str:
    """What the column ``sparsity`` shows: a sparsity, or a budget in tokens."""
    return level_shown(key.removeprefix(f"{entry['method']}_"))


def level_shown(name: str) -> str:
    """``s0.9`` or ``b256``, as keys end, for a reader: ``0.9``, ``256 tokens``."""
    return name[1:] if name.startswith("s") else f"{name[1:]} tokens"


def level_order(name: str) -> tuple[bool, float]:
    """What ``level`` gives as (is it a budget, number): sorts sparsities before budgets."""
    return name.endswith(" tokens"), float(name.removesuffix(" tokens"))


def level_title(name: str) -> str:
    """What ``level`` gives, as a panel's title."""
    return f"budget {name}" if name.endswith(" tokens") else f"sparsity {name}"


def spread(value: Estimate | None, digits: int = 2) -> str:
    """Mean, with the standard deviation where there are several runs: ``23.30 (sd 0.12)``."""
    if value is None:
        return "-"
    mean = f"{value['mean']:.{digits}f}"
    return mean if value["num_runs"] == 1 else f"{mean} (sd {value['std']:.{digits}f})"


def times(ratio: Estimate | None, unit: str = "", digits: int = 2) -> str:
    """A ratio, with its interval where there are several runs: ``1.16 [0.85, 1.59]``."""
    if ratio is None:
        return "-"
    low, high = f"{ratio['low']:.{digits}f}", f"{ratio['high']:.{digits}f}"
    interval = f" [{low}, {high}]" if ratio["num_runs"] > 1 else ""
    return f"{ratio['mean']:.{digits}f}{unit}{interval}"


def change(value: float, base: float, digits: int = 1) -> str:
    """``value`` against ``base`` in percent."""
    return f"{100 * (value / base - 1):+.{digits}f}%"


def percent(share: Interval) -> str:
    """A change in percent, with its interval where there is one: ``+2.9% [+2.4, +3.4]``."""
    told = f"{100 * share.value:+.1f}%"
    if share.low is None or share.high is None:
        return told
    return f"{told} [{100 * share.low:+.1f}, {100 * share.high:+.1f}]"
