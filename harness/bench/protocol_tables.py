"""Tables of README.md and results/README.md over the studies of ``results/PROTOCOL.md``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.aggregate import significance
from ..analysis.change import AFTER_EVICTION, change_of
from ..analysis.task_aggregate import aggregate_tasks, share_of_dense, task_names
from ..errors import UsageError
from ..records.specifications import DENSE
from ..records.stored import measured_points, read_records, read_task_records
from ..report.cells import level_order, level_shown, percent
from ..report.experiment import point_name, tested_hypotheses
from ..report.lines import provenance_line, task_caption
from ..report.tables import Row, markdown

_NEEDLES = "niah_"


def costs_table(folder: Path, *methods: str) -> str:
    """Change of perplexity against dense under eviction, by text and sparsity.

    Args:
        folder: of an experiment whose points are texts.
        methods: rows, in their order.

    """
    points = _points(folder)
    tests = [(_short(name), significance(records)) for name, records in points]
    levels = _levels(points)
    table: list[Row] = [
        ("method", *(f"{text}, {level[1:]}" for level in levels for text, _ in tests))
    ]
    for method in methods:
        cells = [
            _change(test[f"{DENSE}_vs_{method}_{level}"][AFTER_EVICTION])
            for level in levels
            for _, test in tests
        ]
        table.append((method, *cells))
    first = points[0][1][0]
    engine = first["specification"]["engine"]
    counts = ", ".join(
        f"{len(records[0]['windows'])} of {_short(name)}" for name, records in points
    )
    return (
        "Change of perplexity against dense over the tokens predicted after the first eviction, "
        "with its 95% interval over clusters of windows, by text and sparsity. All windows of "
        f"{engine['context_length']} tokens that tile a text: {counts}. Chunks of "
        f"{engine['prefill_chunk']} tokens, blocks of {engine['block_size']}.\n"
        f"{engine['model']}, {provenance_line(first)}\n\n{markdown(table)}"
    )


def hypotheses_table(folder: Path) -> str:
    """Every hypothesis of a study and level, a column for each text."""
    tested = tested_hypotheses(folder)
    names = list(dict.fromkeys(row["point"] for row in tested))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for row in tested:
        change = "-" if row["change"] is None else f"{100 * row['change']:+.1f}%"
        cell = f"{change} {row['verdict']}"
        rows.setdefault((row["hypothesis"], row["level"]), {})[row["point"]] = cell
    table: list[Row] = [
        ("hypothesis", "sparsity", *(_short(name) or "perplexity" for name in names))
    ]
    table += [
        (told, level_shown(level), *(cells.get(name, "-") for name in names))
        for (told, level), cells in rows.items()
    ]
    first = _points(folder)[0][1][0]
    model = first["specification"]["engine"]["model"]
    return f"{model}, {provenance_line(first)}\n\n{markdown(table)}"


def task_means_table(folder: Path, *methods: str) -> str:
    """Mean score of the needles, what that is of dense's, and of all tasks; by method and sparsity.

    Raises:
        UsageError: the folder holds no record of a task.

    """
    records = task_records(folder)
    results = aggregate_tasks(records)
    levels = sorted(
        {key.removeprefix(f"{e['method']}_") for key, e in results.items() if e["method"] != DENSE},
        key=lambda level: level_order(level_shown(level)),
    )
    parts = ("needles", "of dense's", "all tasks")
    heads = [f"{part}, {level_shown(level)}" for level in levels for part in parts]
    table: list[Row] = [("method", *heads)]
    for method in methods:
        keys = [f"{method}_{'s0.0' if method == DENSE else level}" for level in levels]
        cells = [cell for key in keys for cell in _means(records, results, key)]
        table.append((method, *cells))
    told = (
        "Scores from 0 to 1, and the needles' share of dense's with its 95% interval, a bootstrap "
        f"over samples within tasks. {task_caption(records[0])}."
    )
    return f"{told}\n{provenance_line(records[0])}\n\n{markdown(table)}"


def task_records(folder: Path) -> list[dict[str, Any]]:
    """Those of a folder.

    Raises:
        UsageError: it holds none.

    """
    records = read_task_records(folder)
    if not records:
        raise UsageError(
            f"{folder} holds no record of a task; name the folder of a study with tasks"
        )
    return records


def _means(
    records: Sequence[dict[str, Any]], results: dict[str, dict[str, Any]], key: str
) -> list[str]:
    names = [name for name in task_names(records) if name.startswith(_NEEDLES)]
    entry, share, needles = results[key], "-", "-"
    if entry["method"] != DENSE:
        found = share_of_dense(records, key, names)
        if found["interval_95"]:
            low, high = found["interval_95"]
            share = f"{found['ratio']:.3f} [{low:.3f}, {high:.3f}]"
    if names and entry["tasks"].keys() >= set(names):
        needles = f"{np.mean([entry['tasks'][name]['mean'] for name in names]):.2f}"
    return [needles, share, f"{entry['task_score']['mean']:.2f}"]


def _points(folder: Path) -> list[tuple[str, list[dict[str, Any]]]]:
    return [(point_name(p), read_records(folder / p["folder"])) for p in measured_points(folder)]


def _levels(points: Sequence[tuple[str, list[dict[str, Any]]]]) -> list[str]:
    records = points[0][1]
    return sorted({r["level"] for r in records if r["method"] != DENSE})


def _short(name: str) -> str:
    """A point whose text varies, by that alone."""
    return name.removeprefix("dataset ").removeprefix("text:")


def _change(result: dict[str, Any] | None) -> str:
    change = change_of(result)
    return "-" if change is None or change.low is None else percent(change)
