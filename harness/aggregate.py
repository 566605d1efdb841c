"""From run records to ``aggregated_results.json`` and ``significance_tests.json``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

from .perplexity import after_eviction, perplexity, total
from .specification import DENSE
from .statistics import paired_test, summary

METRICS = (
    "perplexity",
    "perplexity_after_eviction",
    "tokens_per_second",
    "peak_memory_mb",
    "avg_cache_size",
)


def aggregate(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """``{"h2o_s0.9": {"method", "sparsity", "num_runs", metric: {mean, std, min, max}}}``.

    Standard deviations are over runs (seeds). Dense evicts nothing, so its
    ``perplexity_after_eviction`` is null; ``dense_after_eviction`` of the other keys is its
    perplexity on the very tokens theirs is over.
    """
    results: dict[str, Any] = {}
    for key, runs in _by_key(records).items():
        entry: dict[str, Any] = {
            "method": runs[0]["method"],
            "sparsity": runs[0]["sparsity"],
            "num_runs": len(runs),
            "num_windows": sum(len(run["windows"]) for run in runs),
        }
        for metric in METRICS:
            entry[metric] = summary([run[metric] for run in runs])
        dense = [_dense_on_the_same(run, records) for run in runs]
        if runs[0]["method"] != DENSE and all(value is not None for value in dense):
            entry["dense_after_eviction"] = summary(dense)
        results[key] = entry
    return results


def significance(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """``{"h2o_vs_cab_s0.9": {...}}``: every pair at equal sparsity, and dense against each.

    The unit is the window; windows are paired by seed and place. Two results a pair: over all
    tokens, and over those after the first eviction.
    """
    by_key = _by_key(records)
    evicting = {key: runs for key, runs in by_key.items() if runs[0]["method"] != DENSE}
    dense = next((runs for runs in by_key.values() if runs[0]["method"] == DENSE), None)
    tests: dict[str, Any] = {}
    for first, second in combinations(evicting.values(), 2):
        if first[0]["sparsity"] == second[0]["sparsity"]:
            tests[_name(first, second)] = _compare(first, second)
    if dense is not None:
        for runs in evicting.values():
            tests[_name(dense, runs)] = _compare(dense, runs)
    return tests


def _name(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> str:
    return f"{first[0]['method']}_vs_{second[0]['method']}_s{second[0]['sparsity']:g}"


def _compare(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> dict[str, Any]:
    a, b = _windows(first), _windows(second)
    shared = sorted(a.keys() & b.keys())
    if not shared:
        raise ValueError(f"{_name(first, second)} share no window")
    result: dict[str, Any] = {
        "test": "paired t-test and Wilcoxon signed-rank on mean NLL per window (nats per token)",
        "all_tokens": paired_test([_nll(a[w]) for w in shared], [_nll(b[w]) for w in shared]),
        "after_eviction": None,
    }
    starts = [
        a[w]["eviction"]["first_eviction_tokens"] or b[w]["eviction"]["first_eviction_tokens"]
        for w in shared
    ]
    if all(
        start is not None and total(a[w], start)[1] for w, start in zip(shared, starts, strict=True)
    ):
        result["after_eviction"] = paired_test(
            [_nll(a[w], start) for w, start in zip(shared, starts, strict=True)],
            [_nll(b[w], start) for w, start in zip(shared, starts, strict=True)],
        )
    return result


def _dense_on_the_same(run: dict[str, Any], records: Iterable[dict[str, Any]]) -> float | None:
    for record in records:
        if record["method"] == DENSE and record["seed"] == run["seed"]:
            starts = [window["eviction"]["first_eviction_tokens"] for window in run["windows"]]
            evicted = after_eviction(record["windows"], starts)
            return perplexity(evicted) if evicted else None
    return None


def _nll(window: dict[str, Any], start: int = 0) -> float:
    log_likelihood, count = total(window, start)
    return -log_likelihood / count


def _windows(runs: list[dict[str, Any]]) -> dict[tuple[int, int], dict[str, Any]]:
    return {(run["seed"], window["start"]): window for run in runs for window in run["windows"]}


def _by_key(records: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    grouped: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        grouped.setdefault(record["key"], []).append(record)
    return grouped
