"""What a sweep finds in its folder: runs that are done, and records that must not be mixed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import UsageError
from .plan import Comparison
from .records import SCHEMA_VERSION, identity, read_json
from .specification import VARIED, RunSpecification, comparison


def missing(
    comparisons: Sequence[Comparison], source: dict[str, Any], redo: bool
) -> list[tuple[Path, RunSpecification]]:
    """The runs without a record of the same specification, code, versions and machine.

    Args:
        comparisons: of the study.
        source: ``records.provenance`` of this process.
        redo: measure again where a record differs, instead of refusing.

    Raises:
        UsageError: a record differs (and ``redo`` is not given), or belongs to no run of the
            study and could not stand in a table with them.

    """
    here = identity({"schema_version": SCHEMA_VERSION, **source})
    todo = []
    for point in comparisons:
        wanted = {run.file_name: run for run in point.runs}
        found = {
            path.name: read_json(path)
            for pattern in ("*_seed*.json", "*_load*.json")
            for path in point.folder.glob(pattern)
        }
        done = set()
        for name, record in found.items():
            reason = _difference(record, here, wanted.get(name), point.runs)
            if reason and (name not in wanted or not redo):
                raise UsageError(
                    f"{point.folder / name} {reason}; give another --experiment-name"
                    + (", or --redo to measure it again" if name in wanted else "")
                )
            if not reason:
                done.add(name)
        todo += [(point.folder, run) for run in point.runs if run.file_name not in done]
    return todo


def _difference(
    record: dict[str, Any],
    here: dict[str, str],
    run: RunSpecification | None,
    runs: Sequence[RunSpecification],
) -> str | None:
    """Why ``record`` is not what this sweep would write, in words."""
    there = identity(record)
    for name in here:
        if there[name] != here[name]:
            return f"was made by another {name} ({there[name]}, here {here[name]})"
    if run is not None and record["specification_hash"] != run.hash:
        return f"holds another specification ({_changes(record['specification'], run.to_dict())})"
    there_specification = record["specification"]
    mates = [r for r in runs if (r.load is None) == (there_specification["load"] is None)]
    if run is None and mates and comparison(there_specification) != mates[0].comparison:
        ours = {k: v for k, v in mates[0].to_dict().items() if k not in VARIED}
        return f"belongs to another comparison ({_changes(there_specification, ours)})"
    return None


def _changes(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> str:
    changes = []
    for name in here:
        a, b = there.get(name), here[name]
        if isinstance(a, dict) and isinstance(b, dict):
            changes.append(_changes(a, b, f"{prefix}{name}."))
        elif a != b:
            changes.append(f"{prefix}{name} {a} there, {b} here")
    return ", ".join(filter(None, changes))
