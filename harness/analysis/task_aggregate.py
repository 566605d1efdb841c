"""From records of tasks to aggregated scores and significance tests. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, TypeAlias

from ..inputs.tasks.registry import TASKS
from .estimate import Estimate
from .pairs import Runs, by_key, dense_of, is_dense, pair_name, pairs_of
from .statistics import estimate, holm, paired_test
from .stratified import stratified_ratio, stratified_test
from .task_scores import same_beginning, unigram_f1

FREE_METRICS = ("ended_share", "mean_answer_tokens", "repetition")
"""Of answers where nothing is right or wrong."""
Place: TypeAlias = tuple[str, int, int]
"""Of a sample: task, seed, and its place among the samples of the two."""
_TESTED = ("paired_t_p", "wilcoxon_p")


def aggregate_tasks(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """``{"h2o_s0.9": {"method", ..., "tasks": {task: Estimate}, "task_score": Estimate}}``.

    Estimates are over seeds. ``task_score`` is the mean over tasks, each of which counts alike;
    None where a seed lacks one of the tasks. ``task_difference`` is the difference of that mean
    from dense's, on the same samples (``stratified_test``); None for dense, and without dense.
    ``task_peak_memory_mib`` is the mean of the tasks' peaks of KV memory.

    ``free`` has, by task, what answers are like where nothing is right or wrong, and how far they
    are dense's: ``same_beginning``, the share of tokens before the first difference, and
    ``unigram_f1``; None without dense.
    """
    names = task_names(records)
    scored = [n for n in names if any(_is(r, n) and r["score"] is not None for r in records)]
    dense = dense_of(by_key(records).values())
    results: dict[str, Any] = {}
    for key, runs in by_key(records).items():
        seeds = sorted({run["seed"] for run in runs})
        known = [r["effective_sparsity"] for r in runs if r["effective_sparsity"] is not None]
        found = {name: [run for run in runs if _is(run, name)] for name in names}
        results[key] = {
            "method": runs[0]["method"],
            "sparsity": runs[0]["sparsity"],
            "budget_tokens": runs[0]["budget_tokens"],
            "effective_sparsity": known[0] if known else None,
            "num_runs": len(seeds),
            "tasks": {n: estimate([r["score"] for r in found[n]]) for n in scored if found[n]},
            "task_score": _mean_score(runs, scored, seeds),
            "task_difference": _difference(dense, runs, scored) if dense else None,
            "task_peak_memory_mib": estimate(
                [fmean(r["peak_memory_mib"] for r in runs if r["seed"] == seed) for seed in seeds]
            ),
            "free": {
                name: _free(found[name], [r for r in records if _is(r, name)])
                for name in names
                if name not in scored and found[name]
            },
        }
    return results


def task_significance(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """``{"h2o_vs_cab_s0.9": {"all_tasks": {...}, "tasks": {task: {...}}}}``: pairs as in
    ``aggregate.significance``.

    The unit is the sample, paired by task, seed and place. ``mean_difference`` is second minus
    first: positive, the second one scores higher. ``all_tasks`` counts every task alike
    (``stratified_test``); a task's own tests are those of ``paired_test``. Holm's correction is
    over all pairs, and over all pairs and tasks.
    """
    tests: dict[str, dict[str, Any]] = {}
    for first, second in pairs_of(records):
        a, b = sample_scores(first), sample_scores(second)
        places = _common(a, b, task_names(records))
        if places:
            tests[pair_name(first, second)] = {
                "test": "paired t-test on the scores of samples, stratified by task; by task a "
                "Wilcoxon signed-rank test too; Holm-corrected over the file",
                "all_tasks": _stratified(a, b, places),
                "tasks": {name: _paired(a, b, there) for name, there in places.items()},
            }
    _adjust([test["all_tasks"] for test in tests.values()])
    _adjust([result for test in tests.values() for result in test["tasks"].values()])
    return tests


def task_names(records: Iterable[dict[str, Any]]) -> list[str]:
    """Tasks of the records, this program's own first, in their order."""
    names = {record["task"] for record in records}
    return [n for n in TASKS if n in names] + sorted(names - set(TASKS))


def share_of_dense(
    records: Sequence[dict[str, Any]], key: str, names: Sequence[str]
) -> dict[str, Any]:
    """``stratified_ratio`` of a key's scores in some tasks to dense's, on the same samples. Nothing
    is known where either lacks one of the tasks."""
    runs = by_key(records)
    a, b = sample_scores(dense_of(runs.values()) or []), sample_scores(runs[key])
    places = _whole(a, b, names)
    if not places:
        return {"ratio": None, "interval_95": None}
    return stratified_ratio([([a[p] for p in at], [b[p] for p in at]) for at in places.values()])


def sample_scores(runs: Runs) -> dict[Place, float]:
    """Scores of a method's samples by (task, seed, place)."""
    return {
        (run["task"], run["seed"], sample["place"]): sample["score"]
        for run in runs
        for sample in run["samples"]
        if sample["score"] is not None
    }


def _is(record: dict[str, Any], task: str) -> bool:
    return record["task"] == task


def _mean_score(runs: Runs, names: Sequence[str], seeds: Sequence[int]) -> Estimate | None:
    means = []
    for seed in seeds:
        scores = {run["task"]: run["score"] for run in runs if run["seed"] == seed}
        if not names or any(scores.get(name) is None for name in names):
            return None
        means.append(fmean(scores[name] for name in names))
    return estimate(means)


def _difference(dense: Runs, runs: Runs, names: Sequence[str]) -> dict[str, Any] | None:
    a, b = sample_scores(dense), sample_scores(runs)
    places = _whole(a, b, names)
    return _stratified(a, b, places) if places and not is_dense(runs[0]) else None


def _whole(
    first: Mapping[Place, float], second: Mapping[Place, float], names: Sequence[str]
) -> dict[str, list[Place]]:
    """``_common`` of all tasks, else nothing: a mean over some of them would be another figure
    under the same name."""
    places = _common(first, second, names)
    return places if list(places) == list(names) else {}


def _common(
    first: Mapping[Place, float], second: Mapping[Place, float], names: Sequence[str]
) -> dict[str, list[Place]]:
    """By task the samples that both have a score of; only tasks with any."""
    common = sorted(first.keys() & second.keys())
    found = {name: [place for place in common if place[0] == name] for name in names}
    return {name: places for name, places in found.items() if places}


def _stratified(
    first: Mapping[Place, float],
    second: Mapping[Place, float],
    places: Mapping[str, Sequence[Place]],
) -> dict[str, Any]:
    """``stratified_test`` of second minus first."""
    return stratified_test([[second[p] - first[p] for p in there] for there in places.values()])


def _free(runs: Runs, records: Runs) -> dict[str, Estimate | None]:
    """What a key's answers are like, of ``runs``, and how far they are dense's, in ``records``."""
    made = {metric: estimate([run[metric] for run in runs]) for metric in FREE_METRICS}
    dense = {record["seed"]: record["samples"] for record in records if is_dense(record)}
    if is_dense(runs[0]) or any(run["seed"] not in dense for run in runs):
        return {**made, "same_beginning": None, "unigram_f1": None}
    pairs = [
        [
            (ours["token_ids"], theirs["token_ids"])
            for ours, theirs in zip(run["samples"], dense[run["seed"]], strict=True)
        ]
        for run in runs
    ]
    return {
        **made,
        "same_beginning": estimate([fmean(same_beginning(*p) for p in run) for run in pairs]),
        "unigram_f1": estimate([fmean(unigram_f1(*p) for p in run) for run in pairs]),
    }


def _paired(
    first: Mapping[Place, float], second: Mapping[Place, float], places: Sequence[Place]
) -> dict[str, Any]:
    """``paired_test`` of scores, which are no nats, of samples, which are no windows."""
    result = paired_test(
        [first[place] for place in places],
        [second[place] for place in places],
        [seed for _, seed, _ in places],
    )
    names = {"mean_difference_nats": "mean_difference", "num_windows": "num_samples"}
    made = {names.get(name, name): value for name, value in result.items()}
    if made["interval_method"]:
        made["interval_method"] = made["interval_method"].replace("windows", "samples")
    return made


def _adjust(family: Sequence[dict[str, Any]]) -> None:
    for name in _TESTED:
        adjusted = holm([result.get(name) for result in family])
        for result, value in zip(family, adjusted, strict=True):
            if name in result:
                result[f"{name}_holm"] = value
                result["family_size"] = len(family)
