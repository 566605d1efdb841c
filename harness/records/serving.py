"""The serving records of a folder: which can be read, and which cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UnreadableFile
from .files import read_record_of
from .former_names import load_in_todays_names
from .specifications import SERVING

SERVING_RECORDS = "*_seed*.json"
_OF_A_RECORD = (
    "run",
    "complete",
    "stop_reason",
    "specification",
    "counts",
    "failures",
    "warnings",
    "summary",
    "quality",
    "memory",
    "samples",
    "schema_version",
    "versions",
    "hardware",
)
"""What a report or a resumed study takes from it."""


def serving_paths(folder: Path) -> list[Path]:
    """Where records are, in order of name."""
    return sorted(folder.glob(SERVING_RECORDS))


def read_serving_record(path: Path) -> dict[str, Any]:
    """One run's record.

    Raises:
        UnreadableFile: it is none, or cut short.

    """
    record = read_record_of(path, {SERVING: _OF_A_RECORD}, "serving")
    if not isinstance(record["run"], dict):
        raise UnreadableFile(
            f"{path} is no serving record (its run is {record['run']!r:.60}); delete it, or move "
            "it elsewhere"
        )
    return load_in_todays_names(record)


def read_serving_records(folder: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The records that can be read; and of the others, by file name, a sentence that says why."""
    records: list[dict[str, Any]] = []
    unreadable: dict[str, str] = {}
    for path in serving_paths(folder):
        try:
            records.append(read_serving_record(path))
        except UnreadableFile as error:
            unreadable[path.name] = str(error)
    return records, unreadable
