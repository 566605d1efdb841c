"""The part of a comparison's page that is about tasks."""

from __future__ import annotations

from typing import Any

from .cells import differs
from .lines import task_caption
from .page import Figure
from .tables import EFFECTIVE, markdown
from .task_tables import free_rows, free_tasks, task_rows, task_test_rows, tasks_of

SCORES = (
    "Scores from 0 to 1: the share of the expected strings that an answer contains, mean over "
    "samples; of a file's own, its metric. *Mean* counts every task alike. *vs dense*: the "
    "difference of that mean on the same samples, with its 95% interval by Student's t over "
    "samples, stratified by task."
)
_FREE = (
    "Greedy answers to windows of the text, neither right nor wrong. *Repeated*: the share of runs "
    "of four tokens that have been there before in the answer. Agreement with dense's answer: the "
    "share of tokens before the first difference, and F1 of tokens as bags."
)


def task_parts(
    records: list[dict[str, Any]],
    results: dict[str, Any],
    tests: dict[str, Any],
    figures: list[tuple[str, str]],
) -> list[str | Figure]:
    """Conditions, tables and figures of a comparison's tasks; [] without any.

    Args:
        records: of tasks.
        results: of ``aggregate_tasks``.
        tests: of ``task_significance``.
        figures: of ``draw_tasks``.

    """
    if not records:
        return []
    seeds = sorted({record["seed"] for record in records})
    parts: list[str | Figure] = [
        "## Tasks",
        f"{task_caption(records[0])}; {len(seeds)} run(s), seed {', '.join(map(str, seeds))}.",
    ]
    if tasks_of(results):
        parts += [
            SCORES,
            markdown(task_rows(results)),
            *([EFFECTIVE] if any(map(differs, results.values())) else []),
            *(Figure(name, text) for name, text in figures),
        ]
    if any(test["all_tasks"] for test in tests.values()):
        parts += [
            "Second minus first, in the mean over tasks: positive means that the second scores "
            "higher. Holm's correction is over all rows. Tests by task are in "
            "`task_significance.json`.",
            markdown(task_test_rows(tests)),
        ]
    for name in free_tasks(results):
        parts += [f"### {name}", _FREE, markdown(free_rows(results, name))]
    return parts
