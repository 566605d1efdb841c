"""Versions, hardware and code of a load, where server and client are one machine's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..records import provenance

_SHARED = (
    "corpora.py",
    "dataset_rows.py",
    "perplexity.py",
    "token_bytes.py",
    "tokens.py",
    "workload.py",
)
_NOT_MEASURING = (
    "bench_client.py",
    "compare_clients.py",
    "figures.py",
    "report.py",
    "stub.py",
    "sweep_aggregate.py",
    "sweep_report.py",
)
"""Tables and figures are made anew anyway. A module is measuring unless it is named here."""


def here() -> dict[str, Any]:
    """What tells loads apart that must not stand in one table, beside their specification."""
    return provenance("cuda" if shutil.which("nvidia-smi") else "cpu", measuring_modules())


def measuring_modules() -> list[str]:
    """Modules of the harness that a load's record depends on, relative to its folder."""
    folder = Path(__file__).resolve().parent
    own = sorted(path.name for path in folder.glob("*.py") if path.name not in _NOT_MEASURING)
    return [*_SHARED, *(f"{folder.name}/{name}" for name in own)]
