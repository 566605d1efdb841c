"""The run records of a folder: read whole, and refused where they must not be mixed."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import UnreadableFile, UsageError
from .common_fields import in_each
from .files import read_json
from .former_names import in_todays_names
from .provenance import identity
from .specifications import (
    BATCH,
    PERPLEXITY,
    SERVING,
    STEADY,
    TASK,
    THROUGHPUT,
    comparison,
    order,
)

EXPERIMENT = "experiment.json"
"""The study, and where its time went."""
OF_SERVING = "study.json"
"""What the first serving studies have in its place."""
AGGREGATED = "aggregated_results.json"
FAILED = "failed"
"""Folder of runs that failed."""
PERPLEXITY_RECORDS, LOAD_RECORDS = "*_seed*.json", "*_load*.json"
TASK_RECORDS = "*_task[0-9]*_*.json"
"""What records of perplexity runs, of throughput runs and of tasks are called."""
_OF_A_RECORD = (
    "schema_version",
    "key",
    "method",
    "sparsity",
    "seed",
    "specification",
    "versions",
    "hardware",
)


def read_record(path: Path) -> dict[str, Any]:
    """The record of a run, with every field that tells records apart.

    Raises:
        UnreadableFile: it is none.

    """
    record = read_json(path)
    lacking = [n for n in _OF_A_RECORD if not isinstance(record, dict) or n not in record]
    if lacking:
        raise UnreadableFile(
            f"{path} is no record of a run (no {lacking[0]}); delete it, or move it elsewhere"
        )
    return in_todays_names(in_each(record))


def read_experiment(path: Path) -> dict[str, Any]:
    """An experiment's ``comparisons`` and ``sessions``, as a sweep keeps them.

    Raises:
        UnreadableFile: the file is damaged, or another program's.

    """
    experiment = read_json(path)
    if not isinstance(experiment, dict) or not isinstance(experiment.get("comparisons"), list):
        raise UnreadableFile(
            f"{path} is no experiment.json; delete it, and kv-eviction offline makes it anew"
        )
    return {"sessions": [], **experiment}


def measured_points(folder: Path) -> list[dict[str, Any]]:
    """The ``comparisons`` of a study that have a record; one that was interrupted lacks some.

    Raises:
        UnreadableFile: as ``read_experiment``.

    """
    points = read_experiment(folder / EXPERIMENT)["comparisons"]
    return [p for p in points if has_records(folder / p["folder"])]


def point_of(folder: Path) -> dict[str, Any]:
    """What an experiment's file says of the point whose records are in ``folder``; {} for none.

    The file is in that folder, or above it where the study varies something.

    Raises:
        UnreadableFile: the file is damaged, or another program's.

    """
    for above in (folder, *folder.resolve().parents[:2]):
        if (above / EXPERIMENT).is_file():
            for point in read_experiment(above / EXPERIMENT)["comparisons"]:
                if (above / point["folder"]).resolve() == folder.resolve():
                    return point
    return {}


def study_kind(folder: Path) -> str | None:
    """``serving``, ``bench`` or ``offline``, by the experiment's file or else by its records;
    None: neither tells.

    Raises:
        UnreadableFile: the experiment's file is damaged, or another program's.

    """
    if (folder / EXPERIMENT).is_file():
        return read_experiment(folder / EXPERIMENT).get("study", {}).get("kind", "offline")
    if (folder / OF_SERVING).is_file():
        return "serving"
    for path in sorted(folder.glob(PERPLEXITY_RECORDS)):
        with suppress(UnreadableFile):
            record = read_json(path)
            kind = record.get("kind") if isinstance(record, dict) else None
            kinds = {SERVING: "serving", BATCH: "bench", STEADY: "bench"}
            return kinds.get(kind or "", "offline")
    return None


def read_records(folder: Path, needed: bool = True) -> list[dict[str, Any]]:
    """Perplexity records of a comparison, in the order of tables.

    Args:
        folder: of the comparison.
        needed: none is an error.

    Raises:
        UsageError: no record, one that cannot be read, or records that must not be mixed.

    """
    records = _read(folder, PERPLEXITY_RECORDS, PERPLEXITY)
    if not records and needed:
        raise UsageError(no_records(folder))
    return records


def no_records(folder: Path) -> str:
    """What a user is told of a folder without a record."""
    return f"{folder} holds no run record; name the folder of an experiment"


def read_load_records(folder: Path) -> list[dict[str, Any]]:
    """Throughput records of a comparison, in the order of tables; none is no error.

    Raises:
        UsageError: one that cannot be read, or records that must not be mixed.

    """
    return _read(folder, LOAD_RECORDS, THROUGHPUT)


def read_task_records(folder: Path) -> list[dict[str, Any]]:
    """Records of a comparison's tasks, in the order of tables; none is no error.

    Raises:
        UsageError: one that cannot be read, or records that must not be mixed.

    """
    return _read(folder, TASK_RECORDS, TASK)


def has_records(folder: Path) -> bool:
    """Whether a comparison's folder has anything to report: perplexity, or tasks."""
    return any(any(folder.glob(pattern)) for pattern in (PERPLEXITY_RECORDS, TASK_RECORDS))


def _read(folder: Path, pattern: str, kind: str) -> list[dict[str, Any]]:
    found = map(read_record, sorted(folder.glob(pattern)))
    # A method's name may look like the end of another kind's.
    records = [record for record in found if record["kind"] == kind]
    check_comparable(folder, records)
    return sorted(records, key=order)


def check_comparable(folder: Path, records: list[dict[str, Any]]) -> None:
    """Refuse records of different engines, texts, code, versions or machines.

    Raises:
        UsageError: which file differs from the first, in what.

    """
    check_sources(folder, records)
    for record in records[1:]:
        if comparison(record["specification"]) != comparison(records[0]["specification"]):
            raise UsageError(_mixed(folder, ["specification"], record, records[0]))


def check_sources(folder: Path, records: list[dict[str, Any]]) -> None:
    """Refuse records of different code, versions or machines, whatever they measure.

    Raises:
        UsageError: which file differs from the first, in what.

    """
    for record in records[1:]:
        mine, others = identity(record), identity(records[0])
        if differing := [name for name in mine if mine[name] != others[name]]:
            raise UsageError(_mixed(folder, differing, record, records[0]))


def _mixed(
    folder: Path, differing: list[str], record: dict[str, Any], first: dict[str, Any]
) -> str:
    return (
        f"{folder} mixes records of different {' and '.join(differing)} "
        f"({record['key']} of seed {record['seed']} and {first['key']} of seed "
        f"{first['seed']}); move one kind to a folder of its own"
    )
