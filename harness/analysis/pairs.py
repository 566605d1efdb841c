"""Which runs of a comparison stand beside which. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import Any, TypeAlias

from ..records.specifications import DENSE

Runs: TypeAlias = list[dict[str, Any]]
"""Records of one key: they differ in seed, and in what was measured."""


def by_key(records: Iterable[dict[str, Any]]) -> dict[str, Runs]:
    """Records by method and budget, in their order."""
    grouped: dict[str, Runs] = {}
    for record in records:
        grouped.setdefault(record["key"], []).append(record)
    return grouped


def pairs_of(records: Iterable[dict[str, Any]]) -> list[tuple[Runs, Runs]]:
    """Every two methods at equal sparsity or budget, and dense against each."""
    groups = by_key(records).values()
    evicting = [runs for runs in groups if not is_dense(runs[0])]
    dense = dense_of(groups)
    pairs = [(a, b) for a, b in combinations(evicting, 2) if level_of(a[0]) == level_of(b[0])]
    if dense is not None:
        pairs += [(dense, runs) for runs in evicting]
    return pairs


def pair_name(first: Runs, second: Runs) -> str:
    """How a pair's tests are called: ``h2o_vs_cab_s0.9``."""
    return f"{first[0]['method']}_vs_{second[0]['method']}_{level_of(second[0])}"


def is_dense(record: dict[str, Any]) -> bool:
    """Whether nothing was evicted."""
    return record["method"] == DENSE


def dense_of(groups: Iterable[Runs]) -> Runs | None:
    """Dense's runs, where they are there."""
    return next((runs for runs in groups if is_dense(runs[0])), None)


def level_of(record: dict[str, Any]) -> str:
    """``s0.9`` or ``b256``: the key without the method."""
    return str(record["key"]).removeprefix(f"{record['method']}_")
