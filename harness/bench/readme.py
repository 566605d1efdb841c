"""Writes the tables between ``<!-- KIND: NAME ... -->`` and ``<!-- end -->`` of READMEs.

    python -m harness.bench.readme README.md results/README.md results

NAMEs lie under ``results``, the last argument. Kinds:

- ``table``: a folder of offline records, or a benchmark's record;
- ``bench``: folders of bench records, one load after the other, or of studies that vary something;
- ``tasks``: the tasks of a folder of records;
- ``throughput``: the throughput pass of a folder of records;
- ``costs``: an experiment whose points are texts, and the methods to show;
- ``hypotheses``: a study that states some;
- ``task-means``: a folder of records of tasks, and the methods to show;
- ``load``: records of loads, side by side;
- ``ablation``: the folder of a study that varies something;
- ``settings``: folders of records below one, a row for each way of scoring;
- ``sampled``: the same, where scores are sampled;
- ``authors``: the file that says which records stand beside the authors' claims;
- ``quality-speed``: a folder of records of perplexity, and one of bench records, joined;
- ``agreement``: two folders of records of one study, from two machines;
- ``lm-eval``: a folder of records of ``scripts/lm_eval``, and the methods to show;
- ``soak``: a record of ``scripts/soak``.

Figures in a README are never typed in.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..analysis.aggregate import aggregate
from ..analysis.task_aggregate import aggregate_tasks
from ..errors import UsageError
from ..records.files import read_json, write_text
from ..records.former_names import load_in_todays_names
from ..records.specifications import DENSE
from ..records.stored import (
    FAILED,
    PERPLEXITY_RECORDS,
    measured_points,
    read_load_records,
    read_record,
    read_records,
)
from ..report.ablation import ablation_rows
from ..report.agreement import agreement_table
from ..report.experiment import point_name
from ..report.lines import caption, provenance_line, task_caption
from ..report.quality_speed import quality_speed_table
from ..report.tables import markdown, markdown_table, throughput_rows
from ..report.task_tables import free_rows, free_tasks, task_rows, tasks_of
from .authors_table import authors_table
from .lm_eval_table import lm_eval_table
from .load_table import load_table
from .protocol_tables import costs_table, hypotheses_table, task_means_table, task_records
from .scoring_tables import sampled_table, settings_table
from .soak_table import soak_table
from .tables import batches_table, bench_table

_KINDS = (
    "table|tasks|bench|throughput|costs|hypotheses|task-means|load|ablation|settings|"
    "sampled|authors|quality-speed|agreement|lm-eval|soak"
)
_MARKED = re.compile(rf"(<!-- ({_KINDS}): (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str, results: Path) -> str:
    """``text`` with every marked table made anew from its records.

    Raises:
        UsageError: two folders to compare are not of the same windows, records must not be
            mixed, or a file cannot be read.

    """

    def made(match: re.Match[str]) -> str:
        table = _TABLES[match[2]](*(results / name for name in match[3].split()))
        return f"{match[1]}\n{table}\n\n{match[4]}"

    return _MARKED.sub(made, text)


def _table(path: Path) -> str:
    if path.suffix == ".json":
        return bench_table(read_json(path))
    records = read_records(path)
    current = aggregate(records, read_load_records(path))
    told = f"{caption(records[0])}, {len({r['seed'] for r in records})} runs."
    return f"{told}\n{provenance_line(records[0])}\n\n{markdown_table(current)}"


def _tasks(path: Path) -> str:
    records = task_records(path)
    results = aggregate_tasks(records)
    told = f"{task_caption(records[0])}; {len({r['seed'] for r in records})} runs."
    tables = [markdown(task_rows(results, effective=False))] if tasks_of(results) else []
    tables += [markdown(free_rows(results, task)) for task in free_tasks(results)]
    return "\n\n".join([f"{told}\n{provenance_line(records[0])}", *tables])


def _throughput(path: Path) -> str:
    records, loads = read_records(path), read_load_records(path)
    load = loads[0]["specification"]["load"]
    runs = len({record["seed"] for record in loads})
    told = (
        f"{records[0]['specification']['dataset']}: {load['num_requests']} requests of "
        f"{load['prompt_tokens']} + {load['output_tokens']} tokens, {runs} loads of each row. "
        "Against dense: the geometric mean of the ratios of loads of one number, with its 95% t "
        "interval."
    )
    rows = throughput_rows(aggregate(records, loads))
    return f"{told}\n{provenance_line(loads[0])}\n\n{markdown(rows)}"


def _ablation(folder: Path) -> str:
    points = measured_points(folder)
    records = [read_records(folder / point["folder"]) for point in points]
    results = [(point_name(p), aggregate(r)) for p, r in zip(points, records, strict=True)]
    first = records[0][0]
    runs = len({record["seed"] for record in records[0]})
    told = f"First column: {caption(first)}, {runs} runs."
    if any(entry["method"] == DENSE for _, point in results for entry in point.values()):
        told += " In brackets: against dense."
    return (
        f"{told}\n{provenance_line(first)}\n\n{markdown(ablation_rows(results, effective=False))}"
    )


def _below(folder: Path) -> list[dict[str, Any]]:
    """Records of all folders below, failed runs aside."""
    paths = sorted(folder.rglob(PERPLEXITY_RECORDS))
    return [read_record(path) for path in paths if path.parent.name != FAILED]


_TABLES: dict[str, Callable[..., str]] = {
    "table": _table,
    "tasks": _tasks,
    "bench": lambda *folders: batches_table(list(folders)),
    "throughput": _throughput,
    "costs": lambda folder, *methods: costs_table(folder, *(m.name for m in methods)),
    "hypotheses": hypotheses_table,
    "task-means": lambda folder, *methods: task_means_table(folder, *(m.name for m in methods)),
    "load": lambda *paths: load_table([load_in_todays_names(read_json(path)) for path in paths]),
    "ablation": _ablation,
    "settings": lambda folder: settings_table(_below(folder)),
    "sampled": lambda folder: sampled_table(_below(folder)),
    "authors": authors_table,
    "quality-speed": quality_speed_table,
    "agreement": lambda a, b: agreement_table(read_records(a), read_records(b)),
    "soak": soak_table,
    "lm-eval": lambda folder, *methods: lm_eval_table(folder, *(m.name for m in methods)),
}


def main() -> None:
    *readmes, results = map(Path, sys.argv[1:])
    try:
        made = {readme: fill(readme.read_text(encoding="utf-8"), results) for readme in readmes}
    except UsageError as error:
        print(f"readme: {error}", file=sys.stderr)
        sys.exit(2)
    for readme, text in made.items():
        write_text(readme, text)


if __name__ == "__main__":
    main()
