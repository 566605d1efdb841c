"""The report of a bench study: its records in, a table, figures' numbers and pages out.

What is told of batches is here, of steady loads in ``steady.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..analysis.bench_aggregate import aggregate_bench
from ..records.batch import read_batch_records, study_load
from ..records.files import write_json
from ..records.specifications import STEADY
from ..records.stored import AGGREGATED, EXPERIMENT, point_of, read_experiment
from .bench_cells import budget, speed
from .cells import times
from .comparison import failures, time_rows
from .host import host_parts
from .lines import machine_line
from .page import write_pages
from .points import report_points
from .steady import STEADY_NOTES, steady_conditions, steady_load, steady_rows
from .tables import Row, markdown

TITLE = "# Bench: "
_BY_SEED = (
    "the geometric mean of the ratios{} of equal seeds [95%, Student's t over seeds of the "
    "logarithm]"
)
_NOTES = {
    "of stock": "*of stock*: the ratio of the medians over seeds",
    "by seed": f"*by seed*: {_BY_SEED.format(' to stock')}",
    "roofline allows": "*roofline allows*: what bytes and FLOPs allow "
    "(`harness/analysis/roofline.py`)",
    "hits": "*hits*: the share of the prompts' tokens that came from the prefix cache; a dash: the "
    "engine has none",
    "of streaming": "*of streaming*: against equally many evictions without scores, "
    + _BY_SEED.format(""),
}


def report_bench_study(folder: Path) -> None:
    """The report of each point of a study; where it varies something, a page that lists them.

    Raises:
        UsageError: no record in any of them, or records that must not be mixed.

    """
    report_points(folder, f"{TITLE}{folder.resolve().name}", report_bench)


def report_bench(folder: Path) -> None:
    """Write table and pages of a folder of bench records.

    Raises:
        UsageError: no record, one that cannot be read, or records that must not be mixed.

    """
    results, records = bench_results(folder)
    write_json(folder / AGGREGATED, results)
    first = records[0]
    load = study_load(first["specification"])
    rows = bench_rows([(load, results)])
    steady = load.get("kind") == STEADY
    conditions = steady_conditions if steady else _conditions
    parts = [
        f"{TITLE}{folder.resolve().name}",
        conditions(first["specification"]["engine"], load, results),
        f"{machine_line(first)}; code {first.get('code', 'unknown')}; {first['timestamp'][:10]}.",
        markdown(rows),
    ]
    all_notes = {**_NOTES, **STEADY_NOTES} if steady else _NOTES
    if notes := [note for column, note in all_notes.items() if column in rows[0]]:
        parts.append(f"{'; '.join(notes)}.")
    parts += host_parts([results])
    if failed := failures(folder):
        lines = [f"- {f['key']}, seed {f['seed']}: {f['reason']}" for f in failed]
        parts += ["## Failed runs", "\n".join(lines)]
    path = folder / EXPERIMENT
    if path.is_file() and (sessions := read_experiment(path)["sessions"]):
        parts += ["Where the time went, by session:", markdown(time_rows(sessions))]
    write_pages(folder, parts)


def bench_results(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Aggregated results of a folder in the order of its study, and the records behind them.

    Raises:
        UsageError: see ``report_bench``.

    """
    records = read_batch_records(folder)
    return aggregate_bench(records, point_of(folder).get("keys", ())), records


def bench_rows(loads: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[Row]:
    """Header and rows: each load with its aggregated results; loads of one kind.

    Columns that no row fills are left out.
    """
    steady = loads[0][0].get("kind") == STEADY
    table = steady_rows(loads) if steady else _batch_rows(loads)
    kept = [i for i in range(len(table[0])) if any(row[i] != "-" for row in table[1:])]
    return [tuple(row[i] for i in kept) for row in table]


def _batch_rows(loads: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[Row]:
    header = (
        "load",
        "method",
        "sparsity",
        "output tok/s",
        "of stock",
        "by seed",
        "roofline allows",
        "reached",
        "hits",
        "of streaming",
        "preemptions",
        "share of time on scores, by phase",
    )
    rows = [_cells(entry.get("load", load), entry) for load, of in loads for entry in of.values()]
    return [header, *rows]


def _cells(load: Mapping[str, Any], entry: Mapping[str, Any]) -> Row:
    preemptions = entry["median_preemptions"]
    return (
        _load(load),
        entry["method"].replace("-", " "),
        budget(entry),
        *speed(entry),
        "-" if entry["hits"] is None else f"{100 * entry['hits']:.1f}%",
        times(entry["against_streaming"], "x", 3),
        "-" if preemptions is None else f"{preemptions:g}",
        ", ".join(
            f"{phase.replace('_', ' ')} {100 * share:.1f}%"
            for phase, share in entry["scoring_share"].items()
        )
        or "-",
    )


def _load(load: Mapping[str, Any]) -> str:
    """Requests and lengths; ``varied``: what else a table of several points must tell."""
    told = f"{load['num_requests']} x ({load['prompt_tokens']} + {load['output_tokens']})"
    if shared := load.get("shared_tokens"):
        told += f", {shared} shared"
    if (turns := load.get("turns", 1)) > 1:
        told += f", {turns} turns"
    if (beams := load.get("beam_width", 1)) > 1:
        told += f", {beams} beams"
    if varied := load.get("varied"):
        told += f", {varied}"
    return told


def bench_caption(record: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """What a study of batches or of a steady load was measured on, in a line.

    Args:
        record: one of it.
        results: its aggregated results.

    """
    engine, load = record["specification"]["engine"], study_load(record["specification"])
    told = steady_load(load) if load.get("kind") == STEADY else _load(load)
    pool = engine["arguments"].get("kv_cache_memory_bytes")
    memory = "default memory" if pool is None else f"{pool / 2**30:g} GiB of KV cache"
    seeds = max(entry["num_runs"] for entry in results.values())
    return (
        f"{Path(engine['model']).name}, {told}, block {engine['block_size']}, {memory}, "
        f"{seeds} seed(s)"
    )


def _conditions(
    engine: Mapping[str, Any], load: Mapping[str, Any], results: Mapping[str, Any]
) -> str:
    seeds = max(entry["num_runs"] for entry in results.values())
    starts = ", engines started anew for each" if engine["rounds"] else ""
    shared, turns = load.get("shared_tokens", 0), load.get("turns", 1)
    alike = f", the first {shared} of them shared" if shared else ""
    again = (
        f", in each of {turns} turns, where a prompt is all that was said and "
        f"{load['turn_tokens']} new tokens"
        if turns > 1
        else ""
    )
    if (beams := load.get("beam_width", 1)) > 1:
        again = (
            f", in each of {beams} beams: vLLM's beam search asks for every token of a beam by a "
            "request of its own"
        )
    return (
        f"{Path(engine['model']).name}, blocks of {engine['block_size']} tokens. Batches of "
        f"{load['num_requests']} requests of {load['prompt_tokens']} random tokens{alike}, all "
        f"there at the start, {load['output_tokens']} output tokens each{again}; {seeds} "
        f"seed(s){starts}. Medians "
        "over seeds. In brackets: the effective sparsity, where blocks that always stay leave "
        "another than was asked."
    )
