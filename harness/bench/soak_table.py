"""The table of a soak: what went through each engine, and what was left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..records.files import read_json
from ..report.lines import provenance_line
from ..report.tables import Row, markdown

_COUNTS = {
    "seconds": "seconds",
    "requests": "requests",
    "aborts": "aborted",
    "refusals": "refused",
    "steps": "steps",
    "preemptions": "preemptions",
    "prefix_hits": "prefix hits",
    "blocks_evicted": "blocks evicted",
    "packs": "packs",
    "copies": "blocks copied first",
    "compared": "answers compared with a quiet run",
    "compared_evicting": "of these, blocks had gone",
    "ties": "ties among them",
    "leaked_blocks": "blocks leaked",
}


def soak_table(path: Path) -> str:
    """Counts of a record of ``scripts/soak``, a column an engine.

    Raises:
        UsageError: the file cannot be read.

    """
    record = read_json(path)
    engines = record["engines"]
    table: list[Row] = [("", *(engine["engine"] for engine in engines))]
    for name, title in _COUNTS.items():
        table.append((title, *(f"{engine[name]:,.0f}" for engine in engines)))
    table.append(("resident MiB, first to last round", *map(_memory, engines)))
    table.append(
        (
            "growth, MiB: median of the last third of rounds less the second's",
            *map(_growth, engines),
        )
    )
    failures = "; ".join(record["failures"]) or "none"
    told = f"{provenance_line(record)} Seed {record['seed']}."
    return f"{told} What did not hold: {failures}.\n\n{markdown(table)}"


def _memory(engine: dict[str, Any]) -> str:
    return f"{engine['memory_mib'][0]:.1f} to {engine['memory_mib'][-1]:.1f}"


def _growth(engine: dict[str, Any]) -> str:
    return f"{engine['memory_growth_mib']:.2f}"
