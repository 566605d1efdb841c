"""From run records to ``aggregated_results.json`` and ``significance_tests.json``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..inputs.windows import ALL_WINDOWS
from .estimate import Estimate
from .pairs import by_key, is_dense, pair_name, pairs_of
from .perplexity import after_eviction, first_affected, last_quarter, perplexity, total
from .statistics import disjoint, estimate, holm, paired_test, ratio_estimate

METRICS = (
    "perplexity",
    "perplexity_after_eviction",
    "word_perplexity",
    "byte_perplexity",
    "bits_per_byte",
    "tokens_per_second",
    "peak_memory_mib",
    "process_peak_memory_mib",
    "device_memory_mib",
    "avg_cache_size",
    "peak_cache_size",
    "blocks_evicted",
    "decision_seconds",
)
LOAD_METRICS = (
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "output_tokens_per_second",
    "peak_memory_mib",
    "preemptions",
    "blocks_evicted",
    "decision_seconds",
)
TESTED = ("all_tokens", "after_eviction", "last_quarter")
CLUSTER_WINDOWS = 8
"""Windows that tile a text depend on their neighbours: so many adjacent ones are a cluster."""


def aggregate(
    records: Sequence[dict[str, Any]], loads: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """``{"h2o_s0.9": {"method", "sparsity", "num_runs", metric: Estimate}}``.

    ``effective_sparsity`` is what the asked sparsity or budget comes to. Standard deviations are
    over runs (seeds).
    ``avg_memory_mib`` is ``avg_cache_size`` in MiB: per window, on average over its steps. Dense
    evicts nothing, so its ``perplexity_after_eviction`` is null; ``dense_after_eviction`` of the
    other keys is its perplexity on the very tokens theirs is over. ``throughput`` holds what the
    separate pass measured, where it was run; its ``against_dense`` is the ratio of output tokens
    per second, paired by load run: loads of one number follow each other closely, so that a
    machine that becomes slower or faster over a sweep changes both.
    """
    results: dict[str, Any] = {}
    by_load = by_key(loads)
    for key, runs in by_key(records).items():
        entry: dict[str, Any] = {
            "method": runs[0]["method"],
            "sparsity": runs[0]["sparsity"],
            "budget_tokens": runs[0]["budget_tokens"],
            "effective_sparsity": runs[0]["effective_sparsity"],
            "num_runs": len(runs),
            "num_windows": sum(len(run["windows"]) for run in runs),
        }
        for metric in METRICS:
            entry[metric] = estimate([run.get(metric) for run in runs])
        entry["perplexity_last_quarter"] = estimate(list(map(_last_quarter, runs)))
        entry["avg_memory_mib"] = estimate([_average_memory_mib(run) for run in runs])
        dense = [_dense_on_the_same(run, records) for run in runs]
        if not is_dense(runs[0]) and all(value is not None for value in dense):
            entry["dense_after_eviction"] = estimate(dense)
        if key in by_load:
            entry["throughput"] = {
                "num_runs": len(by_load[key]),
                **{m: estimate([run[m] for run in by_load[key]]) for m in LOAD_METRICS},
                "against_dense": _against_dense(by_load[key], loads),
            }
        results[key] = entry
    return results


def significance(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """``{"h2o_vs_cab_s0.9": {...}}``: every pair at equal sparsity, and dense against each.

    The unit is the window; windows are paired by seed and place. Windows of different seeds may
    share text, and are no independent units then: of the windows of all seeds only as many are
    tested as share no token. Two results a pair: over all tokens, and over those after the first
    eviction. Each is a family of its own for Holm's correction: ``*_holm`` beside the p-values.
    """
    pairs = [(a, b) for a, b in pairs_of(records) if share_windows(a, b)]
    tests = {pair_name(first, second): compare(first, second) for first, second in pairs}
    for part in TESTED:
        family = [test[part] for test in tests.values() if test[part] is not None]
        for name in ("paired_t_p", "wilcoxon_p"):
            adjusted = holm([result[name] for result in family])
            for result, value in zip(family, adjusted, strict=True):
                result[f"{name}_holm"] = value
                result["family_size"] = len(family)
    return tests


def window_losses(runs: Iterable[dict[str, Any]]) -> dict[tuple[int, int], dict[str, Any]]:
    """Windows of a method's runs by (seed, place)."""
    return {(run["seed"], window["start"]): window for run in runs for window in run["windows"]}


def share_windows(first: Iterable[dict[str, Any]], second: Iterable[dict[str, Any]]) -> bool:
    """Whether two methods can be compared. Runs may have failed, or be still to come: a pair
    without a common window is no pair yet."""
    return bool(window_losses(first).keys() & window_losses(second).keys())


def independent(windows: Iterable[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """Of windows (seed, place) of ``length`` tokens, those to test: no two share a token."""
    ordered = sorted(windows)
    return sorted(ordered[i] for i in disjoint([place for _, place in ordered], length))


def compare(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> dict[str, Any]:
    """Two methods on the windows that both have: ``paired_test`` over all tokens, over those after
    the first eviction of either, and over the last quarter of each window."""
    a, b = window_losses(first), window_losses(second)
    common = a.keys() & b.keys()
    shared = independent(common, first[0]["specification"]["engine"]["context_length"])
    tiled = first[0]["specification"].get("num_samples") == ALL_WINDOWS
    clusters = _neighbours(len(shared)) if tiled else [seed for seed, _ in shared]

    def tested(starts: Iterable[int]) -> dict[str, Any]:
        places = list(zip(shared, starts, strict=True))
        theirs, ours = ([_nll(of[w], s) for w, s in places] for of in (a, b))
        return paired_test(theirs, ours, clusters, neighbours=tiled)

    result: dict[str, Any] = {
        "test": "paired t-test and Wilcoxon signed-rank on mean NLL per window (nats per token), "
        "Holm-corrected over all comparisons of the file, over windows that share no token",
        "num_windows_left_out": len(common) - len(shared),
        "all_tokens": tested([0] * len(shared)),
        "after_eviction": None,
        "last_quarter": None,
    }
    starts = [_earlier(first_affected(a[w]), first_affected(b[w])) for w in shared]
    known = [start for start in starts if start is not None]
    if len(known) == len(shared) and all(map(lambda w, s: total(a[w], s)[1], shared, known)):
        result["after_eviction"] = tested(known)
    late = [s for w in shared if (s := _scored_last_quarter(a[w])) is not None]
    if len(late) == len(shared):
        result["last_quarter"] = tested(late)
    return result


def _neighbours(num_windows: int) -> list[int]:
    """Of windows in the order of the text that they tile, which ones are a cluster."""
    number = max(1, num_windows // CLUSTER_WINDOWS)
    groups = np.array_split(np.arange(num_windows), number)
    return [cluster for cluster, group in enumerate(groups) for _ in group]


def _last_quarter(run: dict[str, Any]) -> float | None:
    starts = [_scored_last_quarter(window) for window in run["windows"]]
    known = [start for start in starts if start is not None]
    return perplexity(map(total, run["windows"], known)) if len(known) == len(starts) else None


def _scored_last_quarter(window: dict[str, Any]) -> int | None:
    """Where it begins; None where it is told by no sum, or not scored as a whole."""
    start = last_quarter(window)
    return None if start is None or start < window.get("num_unscored", 0) else start


def _earlier(a: int | None, b: int | None) -> int | None:
    return min((place for place in (a, b) if place is not None), default=None)


def _dense_on_the_same(run: dict[str, Any], records: Iterable[dict[str, Any]]) -> float | None:
    for record in records:
        if is_dense(record) and record["seed"] == run["seed"]:
            starts = [first_affected(window) for window in run["windows"]]
            evicted = after_eviction(record["windows"], starts)
            return perplexity(evicted) if evicted else None
    return None


def _against_dense(
    runs: Sequence[dict[str, Any]], loads: Iterable[dict[str, Any]]
) -> Estimate | None:
    speed = "output_tokens_per_second"
    dense = {load["seed"]: load[speed] for load in loads if is_dense(load)}
    pairs = [(run[speed], dense[run["seed"]]) for run in runs if run["seed"] in dense]
    return ratio_estimate(pairs) if pairs and not is_dense(runs[0]) else None


def _average_memory_mib(run: dict[str, Any]) -> float:
    # Blocks are counted per layer group, and one group's block holds only that group's layers.
    groups = run["specification"]["engine"]["eviction"]["layer_groups"]
    return run["avg_cache_size"] * groups * run["engine"]["bytes_per_block"] / 2**20


def _nll(window: dict[str, Any], start: int = 0) -> float:
    log_likelihood, count = total(window, start)
    return -log_likelihood / count
