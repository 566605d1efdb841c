"""The table of results/README.md over the records of ``scripts/lm_eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..analysis.change import change_of
from ..analysis.statistics import paired_test
from ..errors import UsageError
from ..records.files import read_record_of
from ..records.specifications import DENSE
from ..report.cells import percent
from ..report.lines import provenance_line
from ..report.tables import Row, markdown

Record = dict[str, Any]
NEEDLE, PASSAGES = "kv_needle", "kv_passages"
FOUND, BITS = "exact_match,first-number", "bits_per_byte,none"
"""lm-eval's names of the scores, with those of their filters."""
_FIELDS = (
    "settings",
    "data_sha256",
    "scores",
    "evicted",
    "samples",
    "versions",
    "hardware",
    "timestamp",
    "code",
)
_OWN = ("task", "method", "sparsity", "server", "request", "num_samples")
"""Settings in which the records of a study may differ."""


def lm_eval_table(folder: Path, *methods: str) -> str:
    """Scores and evictions by method and sparsity.

    Args:
        folder: of the records.
        methods: rows, in their order.

    Raises:
        UsageError: there is no record, one is missing, or records must not be mixed.

    """
    records = _read(folder)
    by_run = {_place(record): record for record in records}
    table: list[Row] = [
        (
            "method",
            "sparsity",
            "needles found",
            "bits per byte",
            "perplexity against dense",
            "effective sparsity",
            "blocks evicted, needles",
            "blocks evicted, passages",
        )
    ]
    levels = sorted(
        {(place[2], methods.index(place[1])) for place in by_run if place[1] in methods}
    )
    for sparsity, index in levels:
        method = methods[index]
        try:
            needle, passages, dense = (
                by_run[place]
                for place in (
                    (NEEDLE, method, sparsity),
                    (PASSAGES, method, sparsity),
                    (PASSAGES, DENSE, 0.0),
                )
            )
        except KeyError as error:
            raise UsageError(
                f"{folder} lacks the record of {error.args[0]}; run scripts/lm_eval/study again"
            ) from None
        table.append(_row(needle, passages, dense))
    return f"{_caption(records)}\n\n{markdown(table)}"


def _row(needle: Record, passages: Record, dense: Record) -> Row:
    settings, seen = needle["settings"], (needle["evicted"], passages["evicted"])
    return (
        settings["method"],
        f"{settings['sparsity']:g}" if settings["sparsity"] else "-",
        f"{needle['scores'][FOUND]:.2f}",
        f"{passages['scores'][BITS]:.3f}",
        "-" if passages is dense else _change(dense, passages),
        " / ".join(f"{evicted['mean_effective_sparsity']:.2f}" for evicted in seen),
        *(f"{evicted['blocks_evicted']:,}" for evicted in seen),
    )


def _change(dense: Record, other: Record) -> str:
    """Of the perplexity by token, with its interval over passages."""
    first, second = (
        [-s["log_likelihood"] / s["tokens"] for s in r["samples"]] for r in (dense, other)
    )
    change = change_of(paired_test(first, second), "interval_95_t")
    assert change is not None
    return percent(change)


def _caption(records: list[Record]) -> str:
    by_task = {record["settings"]["task"]: record for record in records}
    lengths = {
        task: [sample["tokens"] for sample in record["samples"]] for task, record in by_task.items()
    }
    told = " and ".join(
        f"{len(lengths[task])} {what} of {min(lengths[task]):,} to {max(lengths[task]):,} tokens"
        for task, what in ((NEEDLE, "prompts"), (PASSAGES, "passages"))
        if task in lengths
    )
    first = records[0]
    settings = first["settings"]
    return (
        f"{settings['model']}, {settings['text']['dataset']}, {told}; lm-eval "
        f"{first['lm_eval_versions']['lm_eval']}, chunks of {settings['score_chunk']} tokens, "
        f"blocks of {settings['block_size']}. Perplexity is by token, over whole passages, with "
        "its 95% interval by Student's t over passages. Effective sparsity: needles / passages.\n"
        f"{provenance_line(first)}"
    )


def _read(folder: Path) -> list[Record]:
    paths = sorted(folder.glob("kv_*.json"))
    if not paths:
        raise UsageError(f"{folder} holds no record of lm-eval; run scripts/lm_eval/study")
    records = [read_record_of(path, {"lm-eval": _FIELDS}, "lm-eval") for path in paths]
    for record in records[1:]:
        if _common(record) != _common(records[0]):
            raise UsageError(
                f"{folder} mixes records of other settings, code, versions or machines; measure "
                "one kind anew"
            )
    if len({(record["settings"]["task"], record["data_sha256"]) for record in records}) > 2:
        raise UsageError(f"{folder} mixes records of other prompts; measure one kind anew")
    return records


def _common(record: Record) -> Record:
    settings = {name: value for name, value in record["settings"].items() if name not in _OWN}
    return {
        "settings": settings,
        **{name: record[name] for name in ("code", "versions", "hardware")},
    }


def _place(record: Record) -> tuple[str, str, float]:
    settings = record["settings"]
    return settings["task"], settings["method"], settings["sparsity"]
