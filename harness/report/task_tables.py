"""Tables of tasks, from aggregated results; nothing is computed here."""

from __future__ import annotations

from typing import Any

from ..analysis.estimate import Estimate
from .cells import differs, spread
from .tables import Row, asked, head

_FREE = {
    "ended_share": ("ended by EOS", 2),
    "mean_answer_tokens": ("tokens", 0),
    "repetition": ("repeated", 2),
    "same_beginning": ("as dense before the first difference", 2),
    "unigram_f1": ("F1 with dense", 2),
}
"""Heading and digits by metric."""


def tasks_of(results: dict[str, Any]) -> list[str]:
    """Names of the tasks that have a score, in the order of columns."""
    return list(dict.fromkeys(name for entry in results.values() for name in entry["tasks"]))


def task_rows(results: dict[str, Any], effective: bool = True) -> list[Row]:
    """Header and rows: the score of each task by method and sparsity, and their mean.

    Args:
        results: of ``aggregate_tasks``.
        effective: show the effective sparsity, where a row's is another than was asked for.

    """
    effective = effective and any(map(differs, results.values()))
    names = tasks_of(results)
    table: list[Row] = [(*head(effective), *names, "mean", "vs dense", "KV peak MiB")]
    for key, entry in results.items():
        table.append(
            (
                *asked(key, entry, effective),
                *(_score(entry["tasks"].get(name)) for name in names),
                _score(entry["task_score"]),
                _difference(entry["task_difference"]),
                f"{entry['task_peak_memory_mib']['mean']:.1f}",
            )
        )
    return table


def free_rows(results: dict[str, Any], task: str) -> list[Row]:
    """Header and rows of a task whose answers are neither right nor wrong."""
    effective = any(map(differs, results.values()))
    table: list[Row] = [(*head(effective), *(title for title, _ in _FREE.values()))]
    for key, entry in results.items():
        if task in entry["free"]:
            found = entry["free"][task]
            cells = (spread(found[metric], digits) for metric, (_, digits) in _FREE.items())
            table.append((*asked(key, entry, effective), *cells))
    return table


def free_tasks(results: dict[str, Any]) -> list[str]:
    """Names of the tasks whose answers are neither right nor wrong."""
    return list(dict.fromkeys(name for entry in results.values() for name in entry["free"]))


def task_test_rows(tests: dict[str, Any]) -> list[Row]:
    """Header and rows of the tests of the mean over tasks."""
    table: list[Row] = [("comparison", "difference", "95%", "t p", "t p (Holm)", "samples")]
    for name, test in tests.items():
        result = test["all_tasks"]
        low_high = result["interval_95_t"]
        table.append(
            (
                name,
                f"{result['mean_difference']:+.3f}",
                "-" if low_high is None else f"[{low_high[0]:+.3f}, {low_high[1]:+.3f}]",
                _p(result["paired_t_p"]),
                _p(result["paired_t_p_holm"]),
                str(result["num_samples"]),
            )
        )
    return table


def _score(value: Estimate | None) -> str:
    return spread(value, 2)


def _difference(result: dict[str, Any] | None) -> str:
    if result is None:
        return "-"
    told = f"{result['mean_difference']:+.2f}"
    if result["interval_95_t"] is None:
        return told
    low, high = result["interval_95_t"]
    return f"{told} [{low:+.2f}, {high:+.2f}]"


def _p(value: float | None) -> str:
    return "-" if value is None else format(value, ".2g")
