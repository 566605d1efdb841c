"""From bench records to figures per method and budget, over seeds. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from ..records.specifications import STEADY, STOCK
from .roofline import largest_ratio
from .statistics import estimate, ratio_estimate
from .steady_aggregate import last_third, steady_figures

METRICS = ("output_tokens_per_second", "seconds", "preemptions", "engine_start_seconds")
_SPEED = "output_tokens_per_second"
_UNSCORED = "streaming"
"""The policy that evicts without scores: beside it stands what scores cost."""

Record = Mapping[str, Any]


def aggregate_bench(records: Sequence[Record], keys: Sequence[str] = ()) -> dict[str, Any]:
    """``{"h2o_s0.9": {"method", "sparsity", ..., "num_runs", metric: Estimate}}``.

    ``against_stock`` is the ratio of output tokens per second, paired by seed, to the first method
    that is stock vLLM; None without one. ``against_streaming`` is the like to eviction of as many
    blocks without scores, in the same engine where there is such a method. ``median_*`` are medians
    over seeds, and the ratio of those to stock's. ``roofline`` is the largest
    ratio to stock that the GPU allows, where its numbers are known. ``scoring_share`` is the share
    of the batches' time that went into scores, by phase. ``hits`` is the share of the prompts'
    tokens that came from the prefix cache, over all runs; None where there is none. ``load`` is a
    method's own, where it has one. A steady load has ``steady_figures`` too,
    ``last_third_against_stock``, and ``step_against_stock``: the ratio of its milliseconds per
    step, paired by seed, to the first stock vLLM with a load of its own, which is there to make as
    many sequences of as many live tokens.

    Args:
        records: of one study's point.
        keys: in the order of the result; others come behind, stock first.

    """
    groups: dict[str, list[Record]] = {key: [] for key in keys}
    for record in sorted(records, key=lambda r: (r["policy"] != STOCK, r["key"], r["seed"])):
        groups.setdefault(record["key"], []).append(record)
    groups = {key: runs for key, runs in groups.items() if runs}
    stock, alike = (_first_stock(groups.values(), own) for own in (False, True))
    return {key: _entry(runs, stock, alike, groups) for key, runs in groups.items()}


def _first_stock(groups: Iterable[Sequence[Record]], own_load: bool) -> Sequence[Record] | None:
    """The first method that is stock vLLM, on the study's load or on one of its own."""
    for runs in groups:
        if runs[0]["policy"] == STOCK and _has_own_load(runs[0]) == own_load:
            return runs
    return None


def _has_own_load(record: Record) -> bool:
    return "study_load" in record["specification"]


def _entry(
    runs: Sequence[Record],
    stock: Sequence[Record] | None,
    alike: Sequence[Record] | None,
    groups: Mapping[str, Sequence[Record]],
) -> dict[str, Any]:
    first = runs[0]
    unscored = max(
        (g for g in groups.values() if _evicts_alike(g[0], first)),
        key=lambda g: _engine(g[0]) == _engine(first),
        default=None,
    )
    entry: dict[str, Any] = {
        name: first[name]
        for name in ("method", "policy", "sparsity", "budget_tokens", "effective_sparsity")
    }
    entry["num_runs"] = len(runs)
    for metric in METRICS:
        entry[metric] = estimate([run.get(metric) for run in runs])
    if _has_own_load(first):
        entry["load"] = first["specification"]["load"]
    if first["kind"] == STEADY:
        entry |= steady_figures(runs)
        entry["step_against_stock"] = _paired(runs, alike, "ms_per_step")
        others = stock and last_third(stock)
        entry["last_third_against_stock"] = (
            entry["last_third"] / others if others and entry["last_third"] else None
        )
    return entry | {
        "against_stock": _paired(runs, stock),
        "against_streaming": _paired(runs, unscored),
        "median_output_tokens_per_second": _median(runs),
        "median_against_stock": stock and _median(runs) / _median(stock),
        "median_preemptions": median(r["preemptions"] for r in runs if r["preemptions"] is not None)
        if entry["preemptions"]
        else None,
        "roofline": stock and largest_ratio(first, stock[0]),
        "scoring_share": _scoring_share(runs),
        "hits": _hits(runs),
    }


def _evicts_alike(record: Record, other: Record) -> bool:
    return (
        record["policy"] == _UNSCORED
        and other["policy"] != STOCK
        and record["effective_sparsity"] != 0  # None: lengths differ, and some evict
        and all(record[name] == other[name] for name in ("sparsity", "budget_tokens"))
    )


def _engine(record: Record) -> Any:
    return record["specification"]["engine"]


def _paired(runs: Sequence[Record], base: Sequence[Record] | None, metric: str = _SPEED) -> Any:
    if base is None or runs is base:
        return None
    by_seed = {record["seed"]: record[metric] for record in base}
    return ratio_estimate([(r[metric], by_seed[r["seed"]]) for r in runs if r["seed"] in by_seed])


def _median(runs: Sequence[Record]) -> float:
    return median(run[_SPEED] for run in runs)


def _scoring_share(runs: Sequence[Record]) -> dict[str, float]:
    wall = sum(run["seconds"] for run in runs)
    phases = sorted({phase for run in runs for phase in run.get("scoring_seconds", {})})
    shares = {
        phase: sum(run["scoring_seconds"].get(phase, 0.0) for run in runs) / wall
        for phase in phases
    }
    return {phase: share for phase, share in shares.items() if share}


def _hits(runs: Sequence[Record]) -> float | None:
    if not _engine(runs[0]).get("prefix_caching", False):
        return None
    return sum(run["cached_tokens"] for run in runs) / sum(run["prompt_tokens"] for run in runs)
