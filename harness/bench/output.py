"""The flag ``--output`` of a benchmark, and the record that goes there."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..records.files import write_json
from ..records.output import output_path
from ..records.provenance import SCHEMA_VERSION, timestamp


def output_file(name: str) -> Path:
    """A flag's value as a file that can be written, before anything is measured.

    Raises:
        ArgumentTypeError: it cannot; ``argparse`` ends with the sentence and status 2.

    """
    try:
        return output_path(Path(name))
    except UsageError as error:
        raise ArgumentTypeError(str(error)) from None


def write_record(
    path: Path, benchmark: str, fields: Mapping[str, Any], provenance: Mapping[str, Any]
) -> None:
    """Write a record that ``bench/tables.py`` makes a table of.

    Args:
        path: of the file.
        benchmark: its name, by which its table is found.
        fields: what was measured.
        provenance: of the measuring process (``records.provenance``).

    """
    head = {"schema_version": SCHEMA_VERSION, "timestamp": timestamp(), "benchmark": benchmark}
    write_json(path, {**head, **fields, **provenance})
