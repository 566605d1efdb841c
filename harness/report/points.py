"""The report of a study that varies something: one of each point, and a page that lists them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..records.stored import EXPERIMENT, read_experiment
from .page import write_pages


def say(line: str) -> None:
    """Tell the user what a report leaves out."""
    print(f"kv-eviction: {line}", file=sys.stderr)


def report_points(folder: Path, title: str, report: Callable[[Path], Any]) -> None:
    """Make the report of each point of the study in ``folder``.

    Args:
        folder: of the experiment.
        title: of the page that lists the points.
        report: of the folder of one point.

    Raises:
        UsageError: no point has a record.

    """
    path = folder / EXPERIMENT
    points = read_experiment(path)["comparisons"] if path.is_file() else []
    if not any(point["varied"] for point in points):
        report(folder)
        return
    lines, empty = [], []
    for point in points:
        name = ", ".join(f"{key} {value}" for key, value in point["varied"].items())
        try:
            report(folder / point["folder"])
        except UsageError as error:
            empty.append(str(error))
            say(str(error))
        else:
            lines.append(f"- [{name}]({point['folder']}/report.md)")
    if not lines:
        raise UsageError(empty[0])
    write_pages(folder, [title, "\n".join(lines)])
