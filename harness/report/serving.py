"""The report of a serving study: tables and figures from its records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..analysis.serving_aggregate import (
    aggregate_serving,
    max_rates,
    with_shared_perplexity,
)
from ..errors import UsageError
from ..records.files import read_json, write_json
from ..records.provenance import identity
from ..records.serving import read_serving_records
from ..records.specifications import DENSE, STOCK
from ..records.stored import AGGREGATED, FAILED
from .lines import machine_line
from .page import Figure, write_pages
from .points import report_points, say
from .serving_figures import draw_serving, label
from .serving_tables import load_rows, rate_rows, ratio_rows
from .tables import markdown

SLO = "slo.json"
"""The highest rates within the objectives, by method and budget."""
_TITLE = "# Serving: "
_FIRST = (STOCK, DENSE)


def report_serving_study(folder: Path) -> None:
    """The report of each point of a study; where it varies something, a page that lists them.

    Raises:
        UsageError: no complete record in any of them.

    """
    report_points(folder, _title(folder), report_serving)


def report_serving(folder: Path) -> None:
    """Write tables, figures and pages of a folder of serving records.

    Runs that ended early, and files that cannot be read, are named and in no figure.

    Raises:
        UsageError: no complete record.

    """
    everything, unreadable = read_serving_records(folder)
    for reason in unreadable.values():
        say(f"{reason}; the report leaves it out")
    records = sorted((r for r in everything if r["complete"]), key=_order)
    if not records:
        raise UsageError(f"{folder} holds no complete serving record")
    first = identity(records[0])
    for record in records[1:]:
        if differing := [name for name, value in identity(record).items() if value != first[name]]:
            raise UsageError(
                f"records of {folder} differ in {' and '.join(differing)} "
                f"({record['run']['method']}, seed {record['run']['seed']}); "
                "keep those that belong together"
            )
    records = with_shared_perplexity(records)
    baseline = records[0]["method"] if records[0]["method"] in _FIRST else None
    results = aggregate_serving(records, baseline)
    rates = max_rates(results)
    write_json(folder / AGGREGATED, results)
    if rates:
        write_json(folder / SLO, rates)
    entries = list(results.values())
    parts = [
        *_page(entries, list(rates.values()), records, draw_serving(entries, records, folder)),
        *_problems(everything, unreadable, _failed(folder)),
    ]
    write_pages(folder, [_title(folder), *parts])


def _title(folder: Path) -> str:
    """That of the page which is there: a copy, or a folder of another name, is the same study.

    A study's first page takes its folder's name.
    """
    try:
        with (folder / "report.md").open(encoding="utf-8") as page:
            first = page.readline().rstrip("\n")
    except (OSError, UnicodeDecodeError):
        first = ""
    return first if first.startswith(_TITLE) else f"{_TITLE}{folder.resolve().name}"


def _page(
    entries: Sequence[Mapping[str, Any]],
    rates: Sequence[Mapping[str, Any]],
    records: Sequence[Mapping[str, Any]],
    figures: Sequence[tuple[str, str]],
) -> list[str | Figure]:
    seeds = sorted({record["run"]["seed"] for record in records})
    parts: list[str | Figure] = [_conditions(records), machine_line(dict(records[0]))]
    interval = " Intervals: 95%, t distribution over seeds." if len(seeds) > 1 else ""
    parts.append(
        f"Seeds {', '.join(map(str, seeds))}; equal seeds are equal requests at equal "
        f"intended times for every method.{interval}"
    )
    parts.append(markdown(load_rows(entries)))
    if records[0]["quality"]:
        counted = sum(r["shared_windows"] for r in records) / len(records)
        parts.append(
            "Perplexity is over windows whose chunk was kept without preemption under every "
            f"method, {counted:.1f} a run on average; equal ones for all methods."
        )
    if ratios := [entry for entry in entries if entry["against_baseline"]]:
        parts += [
            f"## Times {label(records[0]['run'])}",
            "Ratios at the same rate and seed, so under the same arrivals; geometric mean over "
            "seeds [95% interval].",
            markdown(ratio_rows(ratios)),
        ]
    if rates:
        parts += [
            "## Highest rate within the objectives",
            _slo_line(records[0]),
            markdown(rate_rows(rates)),
            "A short load keeps any rate. *Stay*: where requests of the later half of the arrivals "
            "stay longer than those of the earlier, a longer load may break what this one kept; "
            "where they stay much shorter, the load ended before it was steady.",
        ]
    return [*parts, "## Figures", *(Figure(stem, f"{title}.") for stem, title in figures)]


def _failed(folder: Path) -> list[dict[str, Any]]:
    return [read_json(path) for path in sorted((folder / FAILED).glob("*.json"))]


def _problems(
    everything: Sequence[Mapping[str, Any]],
    unreadable: Mapping[str, str],
    failed: Sequence[Mapping[str, Any]],
) -> list[str]:
    problems = [f"- {f['key']}, seed {f['seed']}: {f['reason']}" for f in failed]
    problems += [
        f"- `{name}` cannot be read and is left out; `kv-eviction serve-sweep` measures it again"
        for name in unreadable
    ]
    broken = [record for record in everything if not record["complete"]]
    problems += [f"- {_run(r['run'])}: {r['stop_reason']}" for r in broken]
    problems += [f"- {_run(r['run'])}: {warning}" for r in everything for warning in r["warnings"]]
    problems += [
        f"- {_run(r['run'])}: {row['count']} x {row['error']} ({row['message']})"
        for r in sorted(everything, key=_order)
        if r["complete"]
        for row in r["failures"]
    ]
    return ["## What did not go as planned", "\n".join(problems)] if problems else []


def _run(run: Mapping[str, Any]) -> str:
    rate = "" if run["request_rate"] is None else f", {run['request_rate']:g}/s"
    return f"{label(run)}{rate}, seed {run['seed']}"


def _conditions(records: Sequence[Mapping[str, Any]]) -> str:
    record = records[0]
    counts = sorted({r["specification"]["num_requests"] for r in records})
    requests = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    run, load, memory = record["run"], record["specification"], record["memory"]
    pool = memory.get("kv_cache_memory_bytes")
    size = f", {pool / 2**20:.0f} MiB" if pool else ""
    rate = "" if run["request_rate"] is None else " at the rates of the table"
    quality = load["quality"]
    share = (
        f" {quality['share']:.0%} of the requests ask for prompt log-probs of known windows of "
        f"{quality['context_length']} tokens of {quality['dataset']}."
        if quality["share"]
        else ""
    )
    return (
        f"{run['model']}, KV pool of {memory.get('num_gpu_blocks', '?')} blocks of "
        f"{run['block_size']} tokens{size}. Per run {requests} requests, "
        f"{load['arrivals']} arrivals{rate}, prompts {load['input_length']} ({load['prompts']}), "
        f"outputs {load['output_length']}."
        f"{share} Latencies count from the intended send time."
    )


def _slo_line(record: Mapping[str, Any]) -> str:
    limits = [
        f"{statistic} {name} at most {limit:g}"
        for name, statistics in record["run"]["slo"].items()
        for statistic, limit in statistics.items()
    ]
    return f"Objectives: {'; '.join(limits)}; every request succeeds; in every seed."


def _order(record: Mapping[str, Any]) -> tuple[Any, ...]:
    run = record["run"]
    rank = _FIRST.index(run["method"]) if run["method"] in _FIRST else len(_FIRST)
    rate = -1.0 if run["request_rate"] is None else run["request_rate"]
    budget = run.get("budget_tokens") or 0
    return rank, run["method"], run["sparsity"], budget, rate, run["seed"]
