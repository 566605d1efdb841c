"""CAB, the curvature-aware budget: 30% local, 20% bridges, 50% importance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .base import (
    ATTENTION,
    DEFAULT,
    GRAPH,
    Policy,
    PolicyParameterError,
    check_selection,
    check_shares,
    shown,
)
from .forman import attention_graph, augmented_forman_curvature
from .select import keep_highest, middle, num_recent, top
from .token_rules import (
    Candidates,
    Ranking,
    TokenRule,
    by_key_difference,
    by_mass,
    by_peak,
    scoring,
)

BRIDGES = {"block": ("median", "forman"), "token": ("key_difference", "peak", "mass", "median")}
"""What a bridge may be at each granularity; the first is what ``default`` means."""


def cab(
    scores: np.ndarray,
    positions: np.ndarray,
    keep: int,
    *,
    num_sink_blocks: int,
    local: float = 0.3,
    bridge: float = 0.2,
    importance: float = 0.5,
    bridge_definition: str = DEFAULT,
    graph: np.ndarray | None = None,
) -> np.ndarray:
    """Keep ``local`` by position, ``importance`` by score, then ``bridge`` among what is left.

    A bridge connects important contexts without being heavy itself:

    - ``median`` (the default): the blocks whose score lies closest to the (upper) median of what
      is left;
    - ``forman``: the blocks of lowest augmented Forman-Ricci curvature in the
      block-to-block attention graph (``graph``, ``[n, n]``; see ``forman.py``).

    Sinks come out of the importance share, as in H2O.
    """
    n = len(positions)
    if keep >= n:
        return np.arange(n)
    num_local = num_recent(keep, local)
    start, stop = middle(
        positions, keep, num_sink_blocks=num_sink_blocks, num_recent_blocks=num_local
    )
    num_bridges = min(round(keep * bridge), keep - start - (n - stop))
    kept = keep_highest(
        scores,
        positions,
        keep - num_bridges,
        num_sink_blocks=num_sink_blocks,
        num_recent_blocks=num_local,
    )
    if num_bridges == 0:
        return kept
    left = np.ones(n, dtype=bool)
    left[kept] = False
    rest = np.flatnonzero(left)
    if bridge_definition == "forman":
        if graph is None:
            raise ValueError("bridge_definition forman needs the block-to-block graph")
        distance = augmented_forman_curvature(attention_graph(graph))[rest]
    else:
        # The upper median is one of the scores: between the two middle ones of an even number,
        # equally far from their mean, rounding would decide.
        half = len(rest) // 2
        distance = np.abs(scores[rest] - np.partition(scores[rest], half)[half])
    left[rest[top(-distance, num_bridges)]] = False
    return np.flatnonzero(~left)


def cab_tokens(parameters: Mapping[str, Any]) -> TokenRule:
    """Every head keeps its local tokens, the important ones, and bridges among what is left:

    - ``key_difference`` (the default): keys unlike the mean key, whatever attention they received,
      as KeyDiff ranks them (``keydiff.py``): what no query has asked for yet can still be found;
    - ``peak``: what some query once needed most;
    - ``mass``: what received the most attention over its whole life;
    - ``median``: the tokens whose score lies closest to the median of what is left.
    """
    definition = POLICY.meant(parameters, "token")["bridge_definition"]
    ranking = _TOKEN_BRIDGES[definition]
    bridges = ((ranking, parameters["bridge"]),) if parameters["bridge"] > 0 else ()
    return TokenRule(
        recent=parameters["local"],
        ranked=((scoring(parameters["value_weighted"]), parameters["importance"]), *bridges),
        selection=parameters["selection"],
    )


def by_median(tokens: Candidates, left: Any) -> Any:
    """Closest to the upper median of the scores that are left."""
    scores = tokens.score
    # What is gone sorts behind everything that is left.
    ranks = (scores * left - 1.0 * ~left).argsort(-1).argsort(-1)
    gone = (~left).sum(-1)[..., None]
    middle = gone + left.sum(-1)[..., None] // 2
    median = (scores * (ranks == middle)).sum(-1)[..., None]
    return -abs(scores - median)


_TOKEN_BRIDGES: Mapping[str, Ranking] = {
    "key_difference": by_key_difference,
    "peak": by_peak,
    "mass": by_mass,
    "median": by_median,
}


def _needs(parameters: Mapping[str, Any]) -> frozenset[str]:
    forman = parameters["bridge_definition"] == "forman" and parameters["bridge"] > 0
    return frozenset({ATTENTION, GRAPH}) if forman else frozenset({ATTENTION})


def _check(parameters: Mapping[str, Any]) -> None:
    check_shares("cab", parameters, ("local", "bridge", "importance"))
    check_selection("cab", parameters["selection"])
    known = dict.fromkeys([DEFAULT, *BRIDGES["block"], *BRIDGES["token"]])
    if parameters["bridge_definition"] not in known:
        raise PolicyParameterError(
            f"bridge_definition of policy cab is {shown(parameters['bridge_definition'])}; "
            f"use one of: {', '.join(known)}"
        )


def _check_granularity(parameters: Mapping[str, Any], granularity: str) -> None:
    definition, known = parameters["bridge_definition"], (DEFAULT, *BRIDGES[granularity])
    if definition not in known:
        raise PolicyParameterError(
            f"bridge_definition {definition!r} of policy cab is not defined at {granularity} "
            f"granularity; use one of: {', '.join(known)}"
        )


POLICY = Policy(
    name="cab",
    select=cab,
    tokens=cab_tokens,
    needs=_needs,
    parameters={"local": 0.3, "bridge": 0.2, "importance": 0.5, "bridge_definition": DEFAULT},
    token_parameters={"selection": "head", "value_weighted": False},
    defaults={where: {"bridge_definition": known[0]} for where, known in BRIDGES.items()},
    check=_check,
    check_granularity=_check_granularity,
)
