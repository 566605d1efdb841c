"""Markdown tables from the records of benchmarks; every figure follows from the record."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from ..records.batch import study_load
from ..records.stored import EXPERIMENT, measured_points
from ..report.bench import bench_results, bench_rows
from ..report.experiment import point_name
from ..report.host import host_parts
from ..report.lines import commit_line
from ..report.tables import Row, markdown
from .kernel_tables import kernels_table


def bench_table(record: dict[str, Any]) -> str:
    """The table of a benchmark's record, by its ``benchmark`` field."""
    return f"{commit_line(record)}\n\n{_TABLES[record['benchmark']](record)}"


def batches_table(folders: list[Path]) -> str:
    """The table of folders of bench records, one load after the other; of a study that varies
    something, all its points.

    Raises:
        UsageError: a folder without records, or records that must not be mixed.

    """
    loads, machines = [], []
    for folder, varied in chain.from_iterable(map(_points, folders)):
        results, records = bench_results(folder)
        loads.append(({**study_load(records[0]["specification"]), "varied": varied}, results))
        machines.append(commit_line(records[0]))
    told = "\n".join(dict.fromkeys(machines))
    host = host_parts([results for _, results in loads])
    return "\n\n".join((told, markdown(bench_rows(loads)), *host))


def _points(folder: Path) -> list[tuple[Path, str]]:
    """Folders of records, and what varies between them beside the load, which rows tell anyway."""
    if not (folder / EXPERIMENT).is_file():
        return [(folder, "")]
    found = []
    for point in measured_points(folder):
        others = {k: v for k, v in point["varied"].items() if not k.startswith("load.")}
        short = {name.rpartition(".")[2]: value for name, value in others.items()}
        found.append((folder / point["folder"], point_name({"varied": short})))
    return found


def _decisions(record: dict[str, Any]) -> str:
    blocks = sorted({entry["live_blocks"] for entry in record["measured"]})
    table: list[Row] = [
        ("median us, one block over budget / half evicted at once", *map(str, blocks))
    ]
    found: dict[str, dict[tuple[int, str], float]] = {}
    for entry in record["measured"]:
        name = "/".join([entry["policy"], *entry["parameters"].values()])
        found.setdefault(name, {})[entry["live_blocks"], entry["case"]] = entry["median_us"]
    for name, times in found.items():
        cells = [f"{times[n, 'one_over']:.0f} / {times[n, 'half']:.0f}" for n in blocks]
        table.append((name, *cells))
    return markdown(table)


def _scheduling(record: dict[str, Any]) -> str:
    table: list[Row] = [
        ("prefix caching", "method", "schedule, ms", "update, ms", "more than stock", "by seed")
    ]
    times: dict[tuple[bool, str], dict[int, tuple[float, float]]] = {}
    for entry in record["measured"]:
        of_seed = times.setdefault((entry["prefix_caching"], entry["method"]), {})
        of_seed[entry["seed"]] = entry["schedule_ms"], entry["update_ms"]
    for (caching, method), by_seed in times.items():
        schedule, update = (fmean(part) for part in zip(*by_seed.values(), strict=True))
        stock = times[caching, "stock"]
        more = [sum(by_seed[seed]) / sum(stock[seed]) - 1.0 for seed in by_seed]
        told = (f"{100 * fmean(more):+.0f}%", f"{100 * min(more):+.1f} to {100 * max(more):+.1f}%")
        cells = ("-", "-") if method == "stock" else told
        table.append(
            ("on" if caching else "off", method, f"{schedule:.2f}", f"{update:.2f}", *cells)
        )
    return markdown(table)


_TABLES = {
    "kernels": kernels_table,
    "decisions": _decisions,
    "scheduling": _scheduling,
}
