"""What a sweep finds in its folder: runs that are done, and records that must not be mixed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UnreadableFile, UsageError
from ..records.provenance import identity
from ..study.points import Comparison
from .job import Job


class Records(ABC):
    """How one kind of study stores its runs."""

    patterns: tuple[str, ...]
    """Of the files' names."""

    @abstractmethod
    def read(self, path: Path) -> dict[str, Any]:
        """A whole record.

        Raises:
            UnreadableFile: it is none.

        """

    @abstractmethod
    def specification(self, record: dict[str, Any]) -> dict[str, Any]:
        """What ``Run.to_dict`` gave when the record was made."""

    def stray(self, record: dict[str, Any], runs: Sequence[Any]) -> str | None:
        """Why a record of none of the study's runs could not stand in a table with them."""
        return None


def missing(
    points: Sequence[Comparison],
    records: Records,
    source: dict[str, Any],
    redo: bool,
    elsewhere: str,
) -> tuple[list[Job], list[str]]:
    """The runs without a record of the same specification, code, versions and machine.

    Args:
        points: of the study.
        records: how its runs are stored.
        source: ``records.provenance`` of this process, and the schema version of its records.
        redo: measure again where a record differs, instead of refusing.
        elsewhere: the flag that names another folder.

    Returns:
        The jobs; and a sentence for each whose record is there but cannot be read.

    Raises:
        UsageError: a record differs (and ``redo`` is not given), or belongs to no run of the
            study and could not stand in a table with them.

    """
    here = identity(source)
    jobs, damaged = [], []
    for point in points:
        wanted = {run.file_name: run for run in point.runs}
        done = set()
        for path in [p for pattern in records.patterns for p in sorted(point.folder.glob(pattern))]:
            run = wanted.get(path.name)
            try:
                reason = _difference(records, records.read(path), here, run, point.runs)
            except UnreadableFile:
                if run is None:  # no run of the study replaces it, and no report could be made
                    raise
                damaged.append(f"{path} cannot be read; its run is measured again")
                continue
            if reason and (run is None or not redo):
                raise UsageError(
                    f"{path} {reason}; give another {elsewhere}"
                    + (", or --redo to measure it again" if run is not None else "")
                )
            if not reason:
                done.add(path.name)
        jobs += [Job(point.folder, run) for run in point.runs if run.file_name not in done]
    return jobs, damaged


def changes(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> str:
    """What differs between two specifications, in words."""
    found = []
    for name in dict.fromkeys((*here, *there)):
        a, b = there.get(name), here.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found.append(changes(a, b, f"{prefix}{name}."))
        elif a != b:
            found.append(f"{prefix}{name} {a} there, {b} here")
    return ", ".join(filter(None, found))


def _difference(
    records: Records,
    record: dict[str, Any],
    here: dict[str, str],
    run: Any | None,
    runs: Sequence[Any],
) -> str | None:
    """Why ``record`` is not what this sweep would write, in words."""
    there = identity(record)
    for name in here:
        if there[name] != here[name]:
            return f"was made by another {name} ({there[name]}, here {here[name]})"
    if run is None:
        return records.stray(record, runs)
    if record.get("specification_hash") != run.hash:
        return (
            f"holds another specification ({changes(records.specification(record), run.to_dict())})"
        )
    return None
