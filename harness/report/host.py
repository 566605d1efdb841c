"""What a report tells of the host's part of a step (``resources/host_profile.py``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .bench_cells import budget
from .tables import Row, markdown

_TITLE = (
    "What the thread that runs vLLM's core works at, milliseconds per step, over 200 steps right "
    "after a window. *plug-in*: the part of its work that is the plug-in's; *waiting*: for the "
    "device. Processor time: of that thread, of its process with all threads, and of the process "
    "that makes the load and takes the answers."
)
_WORK = ("scheduling", "launching", "updating", "requests", "rest")
_HEADER = (
    "method",
    "sparsity",
    "ms/step",
    *_WORK,
    "work",
    "plug-in",
    "waiting",
    "processor: core",
    "its process",
    "the load's",
)


def host_parts(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """A paragraph and a table; nothing where no record tells, as none of a batch does.

    Args:
        results: aggregated, of each load.

    """
    rows = [
        _cells(entry, entry["host"]) for of in results for entry in of.values() if entry.get("host")
    ]
    return [_TITLE, markdown([_HEADER, *rows])] if rows else []


def _cells(entry: Mapping[str, Any], host: Mapping[str, float]) -> Row:
    work = sum(host[name] for name in _WORK)
    told = (
        host["ms_per_step"],
        *(host[name] for name in _WORK),
        work,
        host["plugin"],
        host["waiting"],
        host["core_cpu"],
        host["process_cpu"],
        host["client_cpu"],
    )
    return (entry["method"].replace("-", " "), budget(entry), *(f"{ms:.2f}" for ms in told))
