"""A study's hypotheses, tested on its records as one family. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from ..study.hypotheses import Hypothesis
from .aggregate import compare, share_windows
from .change import AFTER_EVICTION, change_of
from .pairs import Runs, by_key, dense_of, level_of
from .statistics import holm

ALPHA = 0.01
"""Of a difference, after Holm's correction over the whole family."""
CONFIRMED, REFUTED, OPEN = "confirmed", "refuted", "open"
Point: TypeAlias = tuple[str, Sequence[dict[str, Any]]]
"""What was varied, in words (a text), and the records of that comparison."""


def judge(hypotheses: Iterable[Hypothesis], points: Sequence[Point]) -> list[dict]:
    """Every hypothesis at every point and level that measured it.

    The measure is the loss over the tokens predicted after the first eviction of either side. A
    *difference* is confirmed where it has the right sign and p after Holm's correction is below
    ``ALPHA``, refuted where it has the wrong one and such a p. The family is all differences of all
    points. A *cost* is confirmed where the whole 95% interval of the change against dense lies
    within the limit, refuted where it lies beyond.

    Returns:
        A dictionary for each: ``hypothesis``, ``point``, ``level``, ``num_windows``,
        ``change`` and ``interval`` (of perplexity; -0.05: 5% less than the other side),
        ``last_quarter`` (the same over the last quarter of the window), ``p``, ``p_holm`` (None of
        a cost), ``verdict``.

    """
    rows: list[dict[str, Any]] = []
    for hypothesis in hypotheses:
        for point, records in points:
            rows += [
                _tested(hypothesis, point, base, judged, limit)
                for base, judged, limit in _pairs(hypothesis, by_key(records))
                if share_windows(base, judged)
            ]
    differences = [row for row in rows if row["limit"] is None]
    adjusted = holm([row["p"] for row in differences])
    for row, value in zip(differences, adjusted, strict=True):
        row["p_holm"] = value
        if value is not None and value < ALPHA:
            row["verdict"] = CONFIRMED if row["change"] < 0 else REFUTED
    return rows


def _pairs(
    hypothesis: Hypothesis, groups: Mapping[str, Runs]
) -> list[tuple[Runs, Runs, float | None]]:
    """The side that is compared with, the one that is judged, and the limit of its cost."""
    named: dict[str, list[Runs]] = {}
    for runs in groups.values():
        named.setdefault(runs[0]["method"], []).append(runs)
    if hypothesis.better:
        return [
            (worse, better, None)
            for better in named.get(hypothesis.better, ())
            for worse in named.get(hypothesis.worse, ())
            if level_of(better[0]) == level_of(worse[0])
        ]
    dense = dense_of(groups.values())
    return [
        (dense, runs, hypothesis.at_most[runs[0]["sparsity"]])
        for runs in named.get(hypothesis.method, ())
        if dense is not None and runs[0]["sparsity"] in hypothesis.at_most
    ]


def _tested(
    hypothesis: Hypothesis, point: str, base: Runs, judged: Runs, limit: float | None
) -> dict[str, Any]:
    compared = compare(base, judged)
    result = compared[AFTER_EVICTION] or {}
    change, late = change_of(compared[AFTER_EVICTION]), change_of(compared["last_quarter"])
    row: dict[str, Any] = {
        "hypothesis": _told(hypothesis, limit),
        "point": point,
        "level": level_of(judged[0]),
        "limit": limit,
        "num_windows": result.get("num_windows", 0),
        "num_clusters": result.get("num_seeds", 0),
        "change": change and change.value,
        "interval": None if change is None or change.low is None else [*change[1:]],
        "last_quarter": late and late.value,
        "p": result.get("clustered_t_p"),
        "p_holm": None,
        "verdict": OPEN,
    }
    if limit is not None and change is not None and row["interval"] is not None:
        row["p"] = None
        row["verdict"] = {True: CONFIRMED, False: REFUTED, None: OPEN}[change.is_at_most(limit)]
    return row


def _told(hypothesis: Hypothesis, limit: float | None) -> str:
    if limit is None:
        return f"{hypothesis.better} beats {hypothesis.worse}"
    return f"{hypothesis.method} costs at most {100 * limit:g}%"
