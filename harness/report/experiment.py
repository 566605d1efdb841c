"""The report of an experiment: one comparison, or those of a study that varies something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..analysis.hypotheses import judge
from ..errors import UsageError
from ..records.files import write_json
from ..records.stored import (
    EXPERIMENT,
    check_sources,
    has_records,
    no_records,
    read_experiment,
    read_records,
    read_task_records,
)
from ..study.hypotheses import Hypothesis
from .ablation import ablation_rows, draw_ablation, task_ablation_rows, with_metric
from .cells import differs
from .change_figure import draw_changes, is_for
from .comparison import TIMINGS, failure_line, failures, report_comparison, time_rows
from .hypotheses import hypothesis_parts
from .lines import caption, machine_line, task_caption
from .page import Figure, write_pages
from .tables import markdown

_AT = "; *at*: the effective sparsity, where blocks that always stay leave another than was asked"


def report_experiment(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Make ``folder``'s tables, figures and pages anew from its records.

    Returns:
        What was varied ("" for a plain comparison) and the aggregated results, by comparison.

    Raises:
        UsageError: ``folder`` holds no records, one that cannot be read, or records that must
            not be mixed.

    """
    alone: dict[str, Any] = {"sessions": [], "comparisons": [{"varied": {}, "folder": "."}]}
    path = folder / EXPERIMENT
    experiment = read_experiment(path) if path.is_file() else alone
    sessions, points = experiment["sessions"], experiment["comparisons"]
    name = folder.resolve().name
    there = [p for p in points if has_records(folder / p["folder"])]
    if not there:
        raise UsageError(no_records(folder))
    if there == points[:1] and not points[0]["varied"]:
        stated = _stated(folder)
        return [("", report_comparison(folder, name, sessions, stated=stated))]
    reported = []
    for point in there:
        varied = point_name(point)
        # The study's page has the figure over all its points.
        results = report_comparison(folder / point["folder"], f"{name}: {varied}", [], shown=0)
        reported.append((varied, results))
    failed = [
        f"- {point_name(point)}: {failure_line(failed)}"
        for point in points
        for failed in failures(folder / point["folder"])
    ]
    _overview(folder, name, there, reported, failed, sessions, _stated(folder))
    return reported


def tested_hypotheses(folder: Path) -> list[dict[str, Any]]:
    """What became of an experiment's hypotheses, over all its points (``hypotheses.judge``); []
    where it states none, and without an experiment's file.

    Raises:
        UsageError: a record cannot be read, or records must not be mixed.

    """
    path = folder / EXPERIMENT
    experiment = read_experiment(path) if path.is_file() else {}
    stated = [Hypothesis.parse(h) for h in experiment.get("study", {}).get("hypotheses", ())]
    points = experiment["comparisons"] if stated else []
    return judge(
        stated,
        [(point_name(p), read_records(folder / p["folder"], needed=False)) for p in points],
    )


def _stated(folder: Path) -> list[str | Figure]:
    if tested := tested_hypotheses(folder):
        write_json(folder / "hypotheses.json", tested)
    return [*hypothesis_parts(tested)]


def point_name(point: dict[str, Any]) -> str:
    """What was varied at a point of a study (of ``experiment.json``), in words."""
    return ", ".join(f"{name} {value}" for name, value in point["varied"].items())


def _overview(
    folder: Path,
    name: str,
    points: list[dict[str, Any]],
    reported: list[tuple[str, dict[str, Any]]],
    failed: list[str],
    sessions: list[dict[str, Any]],
    stated: list[str | Figure],
) -> None:
    folders = [folder / point["folder"] for point in points]
    firsts = [(read_records(f, needed=False) or read_task_records(f))[0] for f in folders]
    check_sources(folder, firsts)
    first = firsts[0]
    told = caption(first) if "windows" in first else task_caption(first)
    varied = ", ".join(points[0]["varied"])
    values = [value for point in points for value in point["varied"].values()]
    scored, asked = with_metric(reported, "perplexity"), with_metric(reported, "task_score")
    shown = f"{name}: {varied} varied; first: {told}"
    ordered = len(points[0]["varied"]) == 1 and all(isinstance(v, int | float) for v in values)
    told_by = "Perplexity at every point; bars from the lowest to the highest run."
    if scored and is_for(scored) and not ordered:
        draw_changes(scored, folder / "ablation", shown)
        told_by = "What each method costs against dense, over whole windows."
    elif scored:
        draw_ablation(scored, folder / "ablation", shown, ordered)
    links = [
        f"- [{text}]({point['folder']}/report.md)"
        for point, (text, _) in zip(points, reported, strict=True)
    ]
    parts: list[str | Figure] = [
        f"# {name}",
        f"Varied: {varied}. First point: {told}.",
        f"{machine_line(first)}; code {first.get('code', 'unknown')}.",
        *stated,
    ]
    if scored:
        parts += [
            "## Perplexity",
            "Mean and standard deviation over runs; in brackets against dense at the same point"
            f"{_AT if any(differs(e) for _, r in scored for e in r.values()) else ''}.",
            markdown(ablation_rows(scored)),
            Figure("ablation", told_by),
        ]
    if asked:
        parts += [
            "## Tasks",
            "Mean score over tasks, 0 to 1; mean and standard deviation over runs.",
            markdown(task_ablation_rows(asked)),
        ]
    parts += [
        "## Reports",
        "\n".join(links),
    ]
    if failed:
        parts += ["## Failed runs", "\n".join(failed)]
    parts += [TIMINGS, f"Measured {first['timestamp'][:10]}."]
    if sessions:
        parts += ["Where the time went, by session:", markdown(time_rows(sessions))]
    write_pages(folder, parts)
