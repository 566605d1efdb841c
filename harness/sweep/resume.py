"""What a sweep finds in its folder: runs that are done, and records that must not be mixed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UnreadableFile, UsageError
from ..records.provenance import SCHEMA_VERSION, identity
from ..records.specifications import VARIED, comparison
from ..records.stored import LOAD_RECORDS, PERPLEXITY_RECORDS, read_record
from ..study.plan import Comparison
from ..study.specification import RunSpecification


def missing(
    comparisons: Sequence[Comparison], source: dict[str, Any], redo: bool
) -> tuple[list[tuple[Path, RunSpecification]], list[str]]:
    """The runs without a record of the same specification, code, versions and machine.

    Args:
        comparisons: of the study.
        source: ``records.provenance`` of this process.
        redo: measure again where a record differs, instead of refusing.

    Returns:
        The runs with the folders of their records; and a sentence for each of them whose record
        is there but cannot be read.

    Raises:
        UsageError: a record differs (and ``redo`` is not given), or belongs to no run of the
            study and could not stand in a table with them.

    """
    here = identity({"schema_version": SCHEMA_VERSION, **source})
    todo, damaged = [], []
    for point in comparisons:
        wanted = {run.file_name: run for run in point.runs}
        done = set()
        for path in _records(point.folder):
            run = wanted.get(path.name)
            try:
                reason = _difference(read_record(path), here, run, point.runs)
            except UnreadableFile:
                if run is None:  # no run of the study replaces it, and no report could be made
                    raise
                damaged.append(f"{path} cannot be read; its run is measured again")
                continue
            if reason and (run is None or not redo):
                raise UsageError(
                    f"{path} {reason}; give another --experiment-name"
                    + (", or --redo to measure it again" if run is not None else "")
                )
            if not reason:
                done.add(path.name)
        todo += [(point.folder, run) for run in point.runs if run.file_name not in done]
    return todo, damaged


def _records(folder: Path) -> list[Path]:
    kinds = (PERPLEXITY_RECORDS, LOAD_RECORDS)
    return [path for kind in kinds for path in sorted(folder.glob(kind))]


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
    if run is not None and record.get("specification_hash") != run.hash:
        return f"holds another specification ({_changes(record['specification'], run.to_dict())})"
    there_specification = record["specification"]
    mates = [r for r in runs if (r.load is None) == (there_specification.get("load") is None)]
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
