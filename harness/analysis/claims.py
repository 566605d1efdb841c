"""What records say of a claim: the figure it speaks of, and whether it holds. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..records.specifications import DENSE
from ..study.expectations import Bounds
from .aggregate import compare, share_windows
from .change import AFTER_EVICTION, Interval, change_of
from .estimate import Estimate
from .pairs import by_key, dense_of
from .statistics import ratio_estimate

HOLDS, FAILS, OPEN = "holds", "does not hold", "open"
PERPLEXITY, PEAK_MEMORY, MEAN_MEMORY = "perplexity", "peak KV memory", "mean KV memory"
THROUGHPUT = "output throughput"
_MEMORY = {PEAK_MEMORY: "peak_memory_mib", MEAN_MEMORY: "avg_cache_size"}
MEASURES = (PERPLEXITY, *_MEMORY, THROUGHPUT)
"""What the authors' claims speak of; which memory they mean is not said, so both stand here."""
Record = Mapping[str, Any]


class Limit(NamedTuple):
    """What a figure was expected to be."""

    value: float
    at_least: bool = False
    """Else at most."""


def limit_of(measure: str, bounds: Bounds) -> Limit:
    """What ``bounds`` say of one of ``MEASURES``."""
    if measure == THROUGHPUT:
        return Limit(bounds.throughput, at_least=True)
    return Limit(bounds.memory if measure in _MEMORY else bounds.perplexity)


def verdict(measured: Interval, limit: Limit) -> str:
    """``HOLDS`` where the whole interval lies within the limit, ``FAILS`` where it lies wholly
    beyond, else ``OPEN``; without an interval nothing is decided."""
    within = measured.is_at_least if limit.at_least else measured.is_at_most
    return {True: HOLDS, False: FAILS, None: OPEN}[within(limit.value)]


def perplexity_change(
    records: Sequence[dict[str, Any]], method: str, level: str, against: str = DENSE
) -> Interval | None:
    """The change of perplexity over the tokens predicted after the first eviction; None where the
    records lack one of the two sides.

    Args:
        records: of one comparison.
        method, level: ``h2o``, ``s0.9``.
        against: dense, or another method at the same level.

    """
    groups = by_key(records)
    base = dense_of(groups.values()) if against == DENSE else groups.get(f"{against}_{level}")
    runs = groups.get(f"{method}_{level}")
    if base is None or runs is None or not share_windows(base, runs):
        return None
    return change_of(compare(base, runs)[AFTER_EVICTION])


def memory_share(
    records: Sequence[Record], measure: str, method: str, level: str
) -> Interval | None:
    """KV memory as a share of dense's, over runs of equal seed; None where a side is not there.

    ``PEAK_MEMORY`` is of all requests in flight, ``MEAN_MEMORY`` that of a request on average over
    its steps. Both are counted and not sampled: the bounds are the least and the largest run.
    """
    name = _MEMORY[measure]
    dense = {record["seed"]: record[name] for record in records if record["method"] == DENSE}
    runs = [record for record in records if record["key"] == f"{method}_{level}"]
    ratio = ratio_estimate([(r[name], dense[r["seed"]]) for r in runs if r["seed"] in dense])
    return ratio and Interval(ratio["mean"], ratio["min"], ratio["max"])


def throughput_ratio(results: Mapping[str, Any], method: str, level: str) -> Interval | None:
    """Output tokens per second against stock, of ``bench_aggregate.aggregate_bench``; None where a
    side is not there. The interval is over seeds, so a single pair has none."""
    ratio: Estimate | None = results.get(f"{method}_{level}", {}).get("against_stock")
    if ratio is None or ratio["num_runs"] < 2:
        return ratio and Interval(ratio["mean"], None, None)
    return Interval(ratio["mean"], ratio["low"], ratio["high"])
