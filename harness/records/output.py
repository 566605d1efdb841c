"""Where a record goes: known to be writable before a run, and never lost after it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from ..errors import UnwritableFile, UsageError
from .files import write_json


class RecordElsewhere(Exception):
    """A record could not be written where it belongs; the message says why, and where it is."""


def output_path(path: Path) -> Path:
    """``path``, checked to be writable before a run that may take long.

    Raises:
        UsageError: it is not.

    """
    if path.is_dir():
        raise UsageError(f"cannot write to {path}: it is a folder; name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.check")
        partial.touch()
        partial.unlink()
    except (OSError, ValueError) as error:  # ValueError: a path without a name
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot write to {path}: {reason}") from None
    return path


def save_record(path: Path, record: dict[str, Any]) -> None:
    """Write the record of a finished run: to ``path``, or else to a temporary file.

    Raises:
        RecordElsewhere: it is in the temporary file.
        UnwritableFile: there is no room for that either.

    """
    try:
        write_json(path, record)
        return
    except UnwritableFile as error:
        reason = str(error)
    except ValueError as error:  # NaN: our own fault, and no reason to lose the run
        reason = f"cannot write to {path}: {error}"
    elsewhere = _temporary(path, json.dumps(record))
    raise RecordElsewhere(f"{reason}; the record is in {elsewhere}: move it there")


def _temporary(path: Path, text: str) -> Path:
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", prefix=f"{path.stem}.", suffix=".json", delete=False
        ) as file:
            file.write(text)
    except OSError as error:
        raise UnwritableFile(
            f"cannot write to {path}, nor to a temporary file: {error.strerror or error}"
        ) from None
    return Path(file.name)
