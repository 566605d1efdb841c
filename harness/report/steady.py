"""What a report tells of steady loads: the conditions, and a row of each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .bench_cells import budget, speed
from .cells import change, spread
from .tables import Row

_SPLIT = ("attention", "scores", "packing", "products", "other", "idle")
_HEADER = (
    "load",
    "method",
    "sparsity",
    "output tok/s",
    "of stock",
    "by seed",
    "roofline allows",
    "reached",
    "sub-windows",
    "in the last third",
    "ms/step",
    "least ms/step",
    "against stock's step",
    "running",
    "KV in use",
    "preemptions",
    "decisions",
    *_SPLIT,
)
STEADY_NOTES = {
    "sub-windows": "*sub-windows*: the slowest and the fastest part of a window, about five "
    "seconds each, against the whole",
    "in the last third": "*in the last third*: output tokens per second of the last third of a "
    "window, and of stock's there: whether a side still moves",
    "least ms/step": "*least ms/step*: what bytes and FLOPs allow for as many sequences as the "
    "pool holds",
    "against stock's step": "*against stock's step*: milliseconds per step against stock vLLM with "
    "a load of its own, of as many live tokens; the aim is at most 5% more",
    "decisions": "*decisions*: milliseconds per step that the scheduler spends deciding",
    "idle": "*attention* to *idle*: milliseconds per step on the device, of steps under a profiler "
    "right after the window",
}


def steady_rows(loads: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[Row]:
    """Header and rows: each steady load with its aggregated results."""
    rows = [_cells(entry.get("load", load), entry) for load, of in loads for entry in of.values()]
    return [_HEADER, *rows]


def steady_conditions(
    engine: Mapping[str, Any], load: Mapping[str, Any], results: Mapping[str, Any]
) -> str:
    """What was measured, in sentences."""
    seeds = max(entry["num_runs"] for entry in results.values())
    starts = ", engines started anew for each" if engine["rounds"] else ""
    shortest, longest = load["output_tokens"]
    return (
        f"{Path(engine['model']).name}, blocks of {engine['block_size']} tokens. A closed loop of "
        f"{load['num_sequences']} sequences of {load['prompt_tokens']} random tokens and uniform "
        f"outputs of {shortest:,} to {longest:,} tokens. It starts in its steady state, with as "
        "many sequences at an age as the pool holds, and is measured over "
        f"{load['measured_seconds']:g} s; {seeds} seed(s){starts}. Medians over seeds of tokens "
        "per second, else means."
    )


def steady_load(load: Mapping[str, Any]) -> str:
    """Sequences and lengths, as a cell."""
    shortest, longest = load["output_tokens"]
    return f"{load['num_sequences']} x ({load['prompt_tokens']} + {shortest} to {longest})"


def _cells(load: Mapping[str, Any], entry: Mapping[str, Any]) -> Row:
    slowest, fastest = entry["sub_windows_of_mean"]
    least, ratio = entry["roofline_ms_per_step"], entry["step_against_stock"]
    split = entry["split"] or {}
    used = entry["kv_blocks_used"]["mean"] / entry["kv_blocks"]
    return (
        steady_load(load),
        entry["method"].replace("-", " "),
        budget(entry),
        *speed(entry),
        f"{change(slowest, 1)} to {change(fastest, 1)}",
        _last_third(entry),
        spread(entry["ms_per_step"]),
        "-" if least is None else f"{least:.1f}",
        "-" if ratio is None else change(ratio["mean"], 1),
        f"{entry['running']['mean']:.0f}",
        f"{100 * used:.0f}%",
        f"{entry['median_preemptions']:g}",
        f"{entry['decision_ms_per_step']:.2f}" if entry["decision_ms_per_step"] else "-",
        *(f"{split[name]:.2f}" if name in split else "-" for name in _SPLIT),
    )


def _last_third(entry: Mapping[str, Any]) -> str:
    rate, ratio = entry["last_third"], entry["last_third_against_stock"]
    if rate is None:
        return "-"
    return f"{rate:.0f}" if ratio is None else f"{rate:.0f} ({ratio:.2f}x)"
