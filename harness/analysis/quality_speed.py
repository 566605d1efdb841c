"""Quality and speed of one and the same configuration, joined. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from ..errors import UsageError
from ..records.specifications import BATCH, DENSE, STOCK
from .aggregate import aggregate, compare, share_windows
from .bench_aggregate import aggregate_bench
from .change import AFTER_EVICTION, Interval, change_of
from .configuration import Identity, difference, identity, quality_settings, speed_settings
from .curves import pareto
from .estimate import Estimate
from .pairs import Runs, by_key, dense_of, is_dense

_REFERENCE = "reference"
"""Stock vLLM, or dense: nothing is gained, nothing is lost."""


@dataclass(frozen=True)
class Point:
    """One configuration: what it costs and what it gains."""

    method: str
    granularity: str
    level: str
    change: Interval
    """Of perplexity against dense, over the tokens predicted after the first eviction."""
    speed: Estimate
    """Output tokens per second against stock, paired by seed."""
    blocks: float
    """KV blocks of a request, on average over its steps; of the quality's runs."""
    blocks_of_speed: float | None
    """The same of the speed's runs."""
    memory_mib: float
    """KV memory of a request, on average over its steps, of the quality's runs."""
    memory_share: float
    """Of dense's."""
    on_speed_front: bool = False
    """No other configuration is both faster and cheaper; stock is one of them."""
    on_memory_front: bool = False
    """No other holds less memory and is cheaper; dense is one of them."""


@dataclass(frozen=True)
class Joined:
    """All configurations of two folders that both have."""

    points: list[Point]
    dense_memory_mib: float
    reference_on_speed_front: bool
    """Whether stock is: nothing that is faster costs less than nothing."""
    reference_on_memory_front: bool
    """Whether dense is."""
    alone: list[str]
    """What only one of the two measured, in words."""


def join(
    quality: Sequence[dict[str, Any]], speed: Sequence[dict[str, Any]], names: tuple[str, str]
) -> Joined:
    """Runs of perplexity and of batches by policy, parameters, granularity and budget.

    Args:
        quality: records of perplexity, of one comparison.
        speed: records of batches, of one study.
        names: of the two folders, for messages.

    Raises:
        UsageError: a side lacks what it is compared with, nothing joins, or a run of the one was
            measured under other settings than that of the other.

    """
    dense = _dense(quality, speed, names)
    of_quality = _by_identity(quality, lambda record: not is_dense(record))
    of_speed = _by_identity(speed, lambda record: record["policy"] != STOCK)
    both = [key for key in of_quality if key in of_speed]
    if not both:
        raise UsageError(
            f"nothing joins {names[0]} ({_listed(of_quality)}) and {names[1]} "
            f"({_listed(of_speed)}); name folders that measured the same method, granularity and "
            "budget"
        )
    held, gained = aggregate(quality), aggregate_bench(speed)
    of_dense = _mib(held[dense[0]["key"]])
    points = []
    for key, ours in [(name, runs) for name in both for runs in of_quality[name]]:
        theirs = _of_one_configuration(key, ours, of_speed[key], names)
        if (change := _change(dense, ours)) is None:
            raise UsageError(
                f"{key} of {names[0]} shares no window with its dense run, or evicted nothing"
            )
        if (ratio := gained[theirs[0]["key"]]["against_stock"]) is None:
            raise UsageError(f"{key} of {names[1]} shares no seed with its stock run")
        entry = held[ours[0]["key"]]
        points.append(
            Point(
                method=ours[0]["method"],
                granularity=key.granularity,
                level=key.level,
                change=change,
                speed=ratio,
                blocks=entry["avg_cache_size"]["mean"],
                blocks_of_speed=_mean_blocks(theirs),
                memory_mib=_mib(entry),
                memory_share=_mib(entry) / of_dense,
            )
        )
    alone = [f"{key} (quality)" for key in of_quality if key not in of_speed]
    alone += [f"{key} (speed)" for key in of_speed if key not in of_quality]
    return _with_fronts(points, of_dense, alone)


def _dense(
    quality: Sequence[dict[str, Any]], speed: Sequence[dict[str, Any]], names: tuple[str, str]
) -> Runs:
    """Dense's runs, where both sides have what they are compared with."""
    dense = dense_of(by_key(quality).values())
    if dense is None:
        raise UsageError(f"{names[0]} has no run of {DENSE}, which quality is told against")
    if strange := next((r["kind"] for r in speed if r["kind"] != BATCH), None):
        raise UsageError(
            f"{names[1]} holds records of kind {strange}; name the folder of a bench study of "
            "batches, whose requests all have one length"
        )
    if not any(record["policy"] == STOCK for record in speed):
        raise UsageError(f"{names[1]} has no run of {STOCK}, which speed is told against")
    return dense


def _by_identity(
    records: Sequence[dict[str, Any]], wanted: Callable[[dict[str, Any]], bool]
) -> dict[Identity, list[Runs]]:
    """Runs that evict; of one identity there may be several methods, which differ in settings."""
    found: dict[Identity, list[Runs]] = {}
    for runs in by_key(record for record in records if wanted(record)).values():
        first = runs[0]
        if first["sparsity"] or first["budget_tokens"] is not None:
            found.setdefault(identity(first), []).append(runs)
    return found


def _listed(found: Mapping[Identity, Any]) -> str:
    return ", ".join(map(str, found)) or "nothing that evicts"


def _of_one_configuration(
    key: Identity, ours: Runs, candidates: Sequence[Runs], names: tuple[str, str]
) -> Runs:
    settings = quality_settings(ours[0])
    theirs = [speed_settings(runs[0]) for runs in candidates]
    different = [difference(settings, of_speed) for of_speed in theirs]
    if None in different:
        return candidates[different.index(None)]
    name = different[0] or ""
    raise UsageError(
        f"{key} is not one configuration: {name} {settings[name]} in {names[0]}, "
        f"{theirs[0][name]} in {names[1]}; measure both under the same settings"
    )


def _change(dense: Runs, runs: Runs) -> Interval | None:
    return change_of(compare(dense, runs)[AFTER_EVICTION]) if share_windows(dense, runs) else None


def _mean_blocks(runs: Runs) -> float | None:
    values = [run["eviction"].get("average_blocks") for run in runs]
    return None if None in values else fmean(values)


def _mib(entry: Mapping[str, Any]) -> float:
    return float(entry["avg_memory_mib"]["mean"])


def _with_fronts(points: Sequence[Point], of_dense: float, alone: list[str]) -> Joined:
    named = {str(place): point for place, point in enumerate(points)}
    # Less is better of each: memory, cost, and the negative of speed.
    speed = {name: (-point.speed["mean"], point.change.value) for name, point in named.items()}
    memory = {name: (point.memory_share, point.change.value) for name, point in named.items()}
    by_speed = pareto({_REFERENCE: (-1.0, 0.0), **speed})
    by_memory = pareto({_REFERENCE: (1.0, 0.0), **memory})
    marked = [
        replace(point, on_speed_front=name in by_speed, on_memory_front=name in by_memory)
        for name, point in named.items()
    ]
    return Joined(marked, of_dense, _REFERENCE in by_speed, _REFERENCE in by_memory, alone)
