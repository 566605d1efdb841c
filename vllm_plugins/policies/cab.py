"""CAB, the curvature-aware budget: 30% local, 20% bridges, 50% importance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .base import ATTENTION, GRAPH, Policy, PolicyParameterError, check_shares
from .forman import attention_graph, augmented_forman_curvature
from .select import keep_highest, middle, num_recent, top

BRIDGES = ("median", "forman")


def cab(
    scores: np.ndarray,
    positions: np.ndarray,
    keep: int,
    *,
    num_sink_blocks: int,
    local: float = 0.3,
    bridge: float = 0.2,
    importance: float = 0.5,
    bridge_definition: str = "median",
    graph: np.ndarray | None = None,
) -> np.ndarray:
    """Keep ``local`` by position, ``importance`` by score, then ``bridge`` among what is left.

    A bridge connects important contexts without being heavy itself:

    - ``median``: the blocks whose score lies closest to the (upper) median of what is left;
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


def _needs(parameters: Mapping[str, Any]) -> frozenset[str]:
    forman = parameters["bridge_definition"] == "forman" and parameters["bridge"] > 0
    return frozenset({ATTENTION, GRAPH}) if forman else frozenset({ATTENTION})


def _check(parameters: Mapping[str, Any]) -> None:
    check_shares("cab", parameters, ("local", "bridge", "importance"))
    if parameters["bridge_definition"] not in BRIDGES:
        raise PolicyParameterError(
            f"bridge_definition of policy cab is {parameters['bridge_definition']!r}; "
            f"use one of: {', '.join(BRIDGES)}"
        )


POLICY = Policy(
    name="cab",
    select=cab,
    needs=_needs,
    parameters={"local": 0.3, "bridge": 0.2, "importance": 0.5, "bridge_definition": "median"},
    check=_check,
)
