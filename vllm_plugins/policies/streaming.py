"""StreamingLLM (Xiao et al., ICLR 2024, arXiv:2309.17453): attention sinks + recent window."""

from __future__ import annotations

import numpy as np

from .base import Policy
from .select import keep_highest
from .token_rules import TokenRule, by_position


def streaming(
    scores: np.ndarray, positions: np.ndarray, keep: int, *, num_sink_blocks: int
) -> np.ndarray:
    """Keep the first ``num_sink_blocks`` blocks and the most recent of the others.

    Unlike the paper, positions are not re-assigned inside the cache: keys keep the rotary
    position they were written with (as all policies here do).
    """
    return keep_highest(
        positions, positions, keep, num_sink_blocks=num_sink_blocks, num_recent_blocks=keep
    )


POLICY = Policy(
    name="streaming",
    select=streaming,
    # Sinks and the tokens before the window's whole blocks share one block.
    tokens=lambda parameters: TokenRule(recent=1.0, ranked=((by_position, 1.0),)),
)
