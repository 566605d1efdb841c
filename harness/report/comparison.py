"""The report of one comparison: its records in, tables, figures and pages out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..analysis.aggregate import aggregate, significance
from ..analysis.curves import curves
from ..analysis.task_aggregate import aggregate_tasks, task_significance
from ..errors import UsageError
from ..records.files import read_json, write_json
from ..records.stored import (
    AGGREGATED,
    FAILED,
    check_sources,
    no_records,
    read_load_records,
    read_records,
    read_task_records,
)
from .cells import differs
from .expectations import expectation_rows
from .figures import draw
from .lines import caption, machine_line, task_caption
from .page import Figure, write_pages
from .tables import (
    EFFECTIVE,
    Row,
    markdown,
    normalised_rows,
    result_rows,
    test_rows,
    throughput_rows,
)
from .task_figures import draw_tasks
from .task_page import task_parts

_TIMED_FIGURES = ("throughput",)
TIMINGS = "## Speed and time"
"""Two measurements of one specification have the same report up to this heading."""


def report_comparison(
    folder: Path,
    title: str,
    sessions: list[dict[str, Any]],
    shown: int = 1,
    stated: Sequence[str | Figure] = (),
) -> dict[str, Any]:
    """Write everything that follows from the records of ``folder``; the aggregated results.

    Args:
        folder: of the records.
        title: of the page.
        sessions: of the experiment, where its time is to be told.
        stated: the section of the study's hypotheses.
        shown: so many figures stand in ``report.md`` (see ``write_pages``).

    Raises:
        UsageError: no record, one that cannot be read, or records that must not be mixed.

    """
    records, loads = read_records(folder, needed=False), read_load_records(folder)
    asked = read_task_records(folder)
    if not records and not asked:
        raise UsageError(no_records(folder))
    check_sources(folder, [*records[:1], *loads[:1], *asked[:1]])
    task_results, task_tests = aggregate_tasks(asked), task_significance(asked)
    drawn = draw_tasks(folder, task_results, task_caption(asked[0])) if asked else []
    tasks = task_parts(asked, task_results, task_tests, drawn)
    if asked:
        write_json(folder / "task_significance.json", task_tests)
    if records:
        results, tests = aggregate(records, loads), significance(records)
        extra = curves(records, results)
        write_json(folder / "significance_tests.json", tests)
        write_json(folder / "curves.json", extra)
        figures = draw(folder, results, tests, extra, caption(records[0]))
        parts = _page(title, folder, records, loads, results, tests, figures, sessions, tasks)
    else:
        results = {}
        parts = _page_of_tasks(title, folder, asked[0], sessions, tasks)
    results = {
        key: {**task_results.get(key, {}), **results.get(key, {})}
        for key in {**results, **task_results}
    }
    write_json(folder / AGGREGATED, results)
    place = parts.index("## Differences") if "## Differences" in parts else len(parts)
    parts[place:place] = stated
    write_pages(folder, parts, shown)
    return results


def failures(folder: Path) -> list[dict[str, Any]]:
    """Records of failed runs below ``folder``."""
    return [read_json(path) for path in sorted((folder / FAILED).glob("*.json"))]


def failure_line(failed: dict[str, Any]) -> str:
    """Which run failed, and why."""
    task = failed["specification"].get("task")
    name = f"`{failed['key']}`" + (f", {task['name']}," if task else "")
    return f"{name} of seed {failed['seed']}: {failed['reason']}"


def time_rows(sessions: list[dict[str, Any]]) -> list[Row]:
    """Header and rows: where each session's time went."""
    table: list[Row] = [
        (
            "started (UTC)",
            "wall s",
            "engine starts",
            "engine start s",
            "measuring s",
            "harness s",
            "overhead",
            "runs",
        ),
    ]
    for session in sessions:
        table.append(
            (
                session["started"].removesuffix("+00:00"),
                f"{session['wall_seconds']:.0f}",
                str(session["engine_starts"]),
                f"{session['engine_start_seconds']:.0f}",
                f"{session['measuring_seconds']:.0f}",
                f"{session['harness_seconds']:.0f}",
                f"{100 * session['overhead_share']:.1f}%",
                str(session["runs_done"]),
            )
        )
    return table


def _page(
    title: str,
    folder: Path,
    records: list[dict[str, Any]],
    loads: list[dict[str, Any]],
    results: dict[str, Any],
    tests: dict[str, Any],
    figures: list[tuple[str, str]],
    sessions: list[dict[str, Any]],
    tasks: list[str | Figure],
) -> list[str | Figure]:
    first = records[0]
    seeds = sorted({record["seed"] for record in records})
    parts: list[str | Figure] = [
        f"# {title}",
        f"{caption(first)}; {len(seeds)} run(s), seed {', '.join(map(str, seeds))}.",
        f"{_text_line(first)}",
        f"{machine_line(first)}; code {first.get('code', 'unknown')}.",
        "## Results",
        "Mean and standard deviation over runs. *After eviction*: over the tokens predicted after "
        "the first block went, dense beside it on the same tokens.",
        markdown(result_rows(results)),
        *([EFFECTIVE] if any(map(differs, results.values())) else []),
        *_shown(figures, lambda name: name not in _TIMED_FIGURES),
        "## Differences",
        "Second minus first, nats per token: positive means that the first is better. Unit: the "
        f"window, paired by seed and place{_left_out(tests)}. *detectable*: the smallest "
        "difference that a sample of this size and spread finds with 80% power at 5%. Holm's "
        "correction is over all rows of a table.",
        "All tokens:",
        markdown(test_rows(tests, "all_tokens")) if tests else "Nothing to compare.",
    ]
    after = test_rows(tests, "after_eviction")
    if len(after) > 1:
        parts += ["After eviction:", markdown(after)]
    methods = {t["all_tokens"]["interval_method"] for t in tests.values()} - {None}
    if methods:
        parts.append(
            f"Intervals by seeds: {', '.join(sorted(methods))}. By windows: Student's t, all "
            f"windows taken as independent."
        )
    if len(table := normalised_rows(results)) > 1:
        parts += ["## Independent of the tokenizer", markdown(table)]
    parts += [*tasks, *_failed(folder)]
    parts += [TIMINGS, f"Measured {first['timestamp'][:10]}.", _scoring_line(results)]
    if loads:
        load = loads[0]["specification"]["load"]
        repeats = len({record["seed"] for record in loads})
        parts += [
            f"Saturating load, a pass of its own without log-probs: {load['num_requests']} "
            f"requests of {load['prompt_tokens']} + {load['output_tokens']} tokens, all there at "
            f"the start; {repeats} run(s), mean and standard deviation; against dense the "
            f"geometric mean of the ratios of load runs of one number, with its 95% t interval.",
            markdown(throughput_rows(results)),
            *_shown(figures, lambda name: name in _TIMED_FIGURES),
        ]
    if sessions:
        parts += ["Where the time went, by session:", markdown(time_rows(sessions))]
    if len(table := expectation_rows(results, caption(first))) > 1:
        parts += ["## Expected, published, measured", markdown(table, numbers=False)]
    return parts


def _page_of_tasks(
    title: str,
    folder: Path,
    first: dict[str, Any],
    sessions: list[dict[str, Any]],
    tasks: list[str | Figure],
) -> list[str | Figure]:
    """The page of a comparison that measured no perplexity."""
    parts: list[str | Figure] = [
        f"# {title}",
        _text_line(first),
        f"{machine_line(first)}; code {first.get('code', 'unknown')}.",
        *tasks,
        *_failed(folder),
        TIMINGS,
        f"Measured {first['timestamp'][:10]}.",
    ]
    if sessions:
        parts += ["Where the time went, by session:", markdown(time_rows(sessions))]
    return parts


def _failed(folder: Path) -> list[str]:
    lines = [f"- {failure_line(failed)}" for failed in failures(folder)]
    return ["## Failed runs", "\n".join(lines)] if lines else []


def _left_out(tests: dict[str, Any]) -> str:
    most = max((test["num_windows_left_out"] for test in tests.values()), default=0)
    if not most:
        return ""
    return f"; {most} windows that share text with another seed's are in no test"


def _shown(figures: list[tuple[str, str]], wanted: Callable[[str], bool]) -> list[Figure]:
    return [Figure(name, text) for name, text in figures if wanted(name)]


def _text_line(record: dict[str, Any]) -> str:
    text = record["specification"].get("text", {})
    told = [f"Text: {record['specification']['dataset']}"]
    if revision := record.get("dataset_revision"):
        told.append(f"revision {revision}")
    if split := record.get("dataset_split") or text.get("split"):
        told.append(f"split {split}")
    if text.get("sha256"):
        told.append(f"sha256 {text['sha256'][:16]}...")
    if skipped := record.get("dataset_skipped_rows"):
        told.append(f"{skipped} rows without text left out")
    if "document_mode" in text:
        told.append(f"documents: {text['document_mode']}")
    if record["specification"].get("min_context", 1) > 1:
        told.append(f"first {record['specification']['min_context']} tokens not scored")
    return ", ".join(told) + "."


def _scoring_line(results: dict[str, Any]) -> str:
    pairs = [f"{key} {entry['tokens_per_second']['mean']:.0f}" for key, entry in results.items()]
    return f"Tokens scored per second, log-probs on: {', '.join(pairs)}."
