"""H2O: heavy hitters + recent (Zhang et al., NeurIPS 2023, arXiv:2306.14048)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .base import ATTENTION, Policy, check_selection, check_shares
from .select import keep_highest, num_recent
from .token_rules import TokenRule, scoring


def h2o(
    scores: np.ndarray,
    positions: np.ndarray,
    keep: int,
    *,
    num_sink_blocks: int,
    recent: float = 0.2,
    heavy: float = 0.8,
) -> np.ndarray:
    """Keep the ``recent`` share of the budget by position, the ``heavy`` share by score.

    A block's score is the attention mass it received (its tokens' column sums of the
    attention matrix, over queries, heads and the layers of a group). Sinks count as heavy
    hitters: they come out of the heavy share.
    """
    return keep_highest(
        scores,
        positions,
        keep,
        num_sink_blocks=num_sink_blocks,
        num_recent_blocks=num_recent(keep, recent),
    )


def h2o_tokens(parameters: Mapping[str, Any]) -> TokenRule:
    """As the paper has it: every head keeps its recent tokens, and those of the highest score.

    The paper splits the budget in halves; ``recent=0.5, heavy=0.5`` is that.

    ``selection`` and ``value_weighted``: see ``token_rules``.
    """
    return TokenRule(
        recent=parameters["recent"],
        ranked=((scoring(parameters["value_weighted"]), parameters["heavy"]),),
        selection=parameters["selection"],
    )


def _check(parameters: Mapping[str, Any]) -> None:
    check_shares("h2o", parameters, ("recent", "heavy"))
    check_selection("h2o", parameters["selection"])


POLICY = Policy(
    name="h2o",
    select=h2o,
    tokens=h2o_tokens,
    needs=frozenset({ATTENTION}),
    parameters={"recent": 0.2, "heavy": 0.8},
    token_parameters={"selection": "head", "value_weighted": False},
    check=_check,
)
