"""Perplexity by how scores are gathered, in Markdown."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..analysis.perplexity import total
from ..analysis.statistics import mean_interval
from ..records.former_names import eviction_of
from ..report.cells import level
from ..report.lines import commit_line
from ..report.tables import Row, markdown


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
        f"{engine['block_size']}. {commit_line(record)}"
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
