"""PagedEviction's rule (Chitty-Venkata et al., 2025, arXiv:2509.04377): no attention needed."""

from __future__ import annotations

import numpy as np

from .base import KEY_NORM, Policy, check_recent
from .select import keep_highest, num_recent
from .token_rules import TokenRule, by_key_norm


def key_norm(
    scores: np.ndarray,
    positions: np.ndarray,
    keep: int,
    *,
    num_sink_blocks: int,
    recent: float = 0.2,
) -> np.ndarray:
    """Evict the blocks whose mean ``||v|| / ||k||`` is lowest.

    PagedEviction scores a block by the mean over its tokens of the ratio of value norm to key
    norm (here summed over the KV heads and the layers of a group) and evicts the lowest. Two
    departures, shared by all policies here: sinks are protected, and so is a recent window
    (``recent=0`` leaves one block of it).
    """
    return keep_highest(
        scores,
        positions,
        keep,
        num_sink_blocks=num_sink_blocks,
        num_recent_blocks=num_recent(keep, recent),
    )


POLICY = Policy(
    name="key_norm",
    select=key_norm,
    tokens=lambda p: TokenRule(recent=p["recent"], ranked=((by_key_norm, 1.0),)),
    needs=frozenset({KEY_NORM}),
    parameters={"recent": 0.2},
    check=lambda p: check_recent("key_norm", p["recent"]),
)
