"""The bench records of a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .files import read_record_of
from .specifications import BATCH, STEADY, digest
from .stored import check_sources

BATCH_RECORDS = "*_seed*.json"
_OF_A_RECORD = (
    "schema_version",
    "key",
    "method",
    "policy",
    "sparsity",
    "budget_tokens",
    "effective_sparsity",
    "seed",
    "seconds",
    "output_tokens",
    "output_tokens_per_second",
    "preemptions",
    "specification",
    "versions",
    "hardware",
    "timestamp",
)
_OF_A_STEADY_RECORD = (
    *_OF_A_RECORD,
    "steps",
    "ms_per_step",
    "tokens_per_step",
    "running",
    "kv_blocks",
    "kv_blocks_used",
    "sub_windows",
    "decision_seconds",
    "split",
)
_KINDS = {BATCH: _OF_A_RECORD, STEADY: _OF_A_STEADY_RECORD}
"""What a report or a resumed study takes from a record, by its kind."""


def read_batch_record(path: Path) -> dict[str, Any]:
    """One run's record.

    Raises:
        UnreadableFile: it is none, or cut short.

    """
    return read_record_of(path, _KINDS, "bench")


def read_batch_records(folder: Path) -> list[dict[str, Any]]:
    """The records of a folder, by name.

    Raises:
        UsageError: none, one that cannot be read, or records that must not be mixed.

    """
    records = [read_batch_record(path) for path in sorted(folder.glob(BATCH_RECORDS))]
    if not records:
        raise UsageError(f"{folder} holds no bench record; name the folder of a bench study")
    check_sources(folder, records)
    for record in records[1:]:
        if digest(study_load(record["specification"])) != digest(
            study_load(records[0]["specification"])
        ):
            raise UsageError(
                f"{folder} mixes records of different loads ({record['key']} and "
                f"{records[0]['key']}); move one kind to a folder of its own"
            )
    return records


def study_load(specification: Mapping[str, Any]) -> dict[str, Any]:
    """The load of the study that a record's specification belongs to.

    A method may have a load of its own; records of one study agree in this one all the same.
    """
    return specification.get("study_load", specification["load"])
