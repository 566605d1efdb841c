"""Markdown tables from the records of benchmarks; every figure follows from the record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.aggregate import aggregate, significance
from ..records.batch import study_load
from ..records.specifications import DENSE
from ..report.bench import bench_results, bench_rows
from ..report.cells import level
from ..report.lines import commit_line, provenance_line
from ..report.tables import Row, markdown
from .kernel_tables import kernels_table


def bench_table(record: dict[str, Any]) -> str:
    """The table of a benchmark's record, by its ``benchmark`` field."""
    return f"{commit_line(record)}\n\n{_TABLES[record['benchmark']](record)}"


def batches_table(folders: list[Path]) -> str:
    """The table of folders of bench records, one load after the other.

    Raises:
        UsageError: a folder without records, or records that must not be mixed.

    """
    loads, machines = [], []
    for folder in folders:
        results, records = bench_results(folder)
        loads.append((study_load(records[0]["specification"]), results))
        machines.append(commit_line(records[0]))
    told = "\n".join(dict.fromkeys(machines))
    return f"{told}\n\n{markdown(bench_rows(loads))}"


def headline_table(texts: list[list[dict[str, Any]]]) -> str:
    """Change of perplexity and KV memory against dense, at the lowest and the highest sparsity.

    Perplexity and its interval follow from the differences in loss of windows that share no
    token, KV memory from the peaks of the first text's runs.

    Args:
        texts: the records of each text, of the same methods and sparsities, dense among them.

    """
    results = aggregate(texts[0])
    dense = results[f"{DENSE}_s0.0"]
    evicting = {key: entry for key, entry in results.items() if entry["method"] != DENSE}
    sparsities = [entry["sparsity"] for entry in evicting.values()]
    tests = {_text(records[0]): significance(records) for records in texts}
    table: list[Row] = [("method", "sparsity", *tests, "KV memory at its peak")]
    for key, entry in evicting.items():
        if entry["sparsity"] not in (min(sparsities), max(sparsities)):
            continue
        found = [by_name[f"{DENSE}_vs_{key}"]["all_tokens"] for by_name in tests.values()]
        memory = entry["peak_memory_mib"]["mean"] / dense["peak_memory_mib"]["mean"]
        cells = [_percent(t["mean_difference_nats"], t["interval_95_t"]) for t in found]
        table.append((entry["method"], level(key, entry), *cells, f"{memory:.0%}"))
    counts = " and ".join(
        f"{by_name[f'{DENSE}_vs_{key}']['all_tokens']['num_windows']} windows of {name}"
        for name, by_name in tests.items()
    )
    first = texts[0][0]
    engine = first["specification"]["engine"]
    return (
        f"Change of perplexity against dense, with its 95% interval by Student's t over windows of "
        f"{engine['context_length']} tokens: {counts}. No two of them share a token. Blocks of "
        f"{engine['block_size']} tokens go after every {engine['prefill_chunk']}.\n"
        f"{Path(engine['model']).name}, {provenance_line(first)}\n\n{markdown(table)}"
    )


def _text(record: dict[str, Any]) -> str:
    return record["specification"]["dataset"].removeprefix("text:").rsplit("/", 1)[-1]


def _percent(nats: float, interval: list[float]) -> str:
    """A difference in loss as a change of perplexity, with its interval."""
    value, low, high = 100 * np.expm1([nats, *interval])
    return f"{value:+.1f}% [{low:+.1f}, {high:+.1f}]"


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


_TABLES = {
    "kernels": kernels_table,
    "decisions": _decisions,
}
