"""Tables for a terminal."""

from __future__ import annotations

from typing import Any

from .tables import aligned, result_rows, throughput_rows
from .task_tables import free_rows, free_tasks, task_rows, tasks_of


def text_table(results: dict[str, Any]) -> str:
    """The tables of what was measured: perplexity, throughput, tasks.

    Args:
        results: ``aggregated_results.json``.

    """
    scored = {key: entry for key, entry in results.items() if "perplexity" in entry}
    asked = {key: entry for key, entry in results.items() if "tasks" in entry}
    tables = [result_rows(scored), throughput_rows(scored)]
    tables += [task_rows(asked)] if tasks_of(asked) else []
    tables += [free_rows(asked, task) for task in free_tasks(asked)]
    return "\n\n".join(aligned(table) for table in tables if len(table) > 1)
