"""The control: what a heavy share chosen by chance is worth."""

from __future__ import annotations

import numpy as np

from .base import CHANCE, Policy, check_recent
from .select import keep_highest, num_recent
from .token_rules import TokenRule, by_chance


def random(
    scores: np.ndarray,
    positions: np.ndarray,
    keep: int,
    *,
    num_sink_blocks: int,
    chance: np.ndarray,
    recent: float = 0.2,
) -> np.ndarray:
    """Sinks and H2O's recent window, then blocks drawn uniformly.

    It differs from H2O in the heavy share alone, so the gap between the two is what the
    scores are worth. A block's number (``chance``, float ``[n]``) is drawn once. Drawing anew at
    every decision would favour the recent: an old block would have to win many times.
    """
    return keep_highest(
        chance,
        positions,
        keep,
        num_sink_blocks=num_sink_blocks,
        num_recent_blocks=num_recent(keep, recent),
    )


POLICY = Policy(
    name="random",
    select=random,
    tokens=lambda p: TokenRule(recent=p["recent"], ranked=((by_chance, 1.0),)),
    needs=frozenset({CHANCE}),
    parameters={"recent": 0.2},
    check=lambda p: check_recent("random", p["recent"]),
)
