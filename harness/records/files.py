"""JSON and text files, written whole or not at all."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from ..errors import UnreadableFile, UnwritableFile

_NUMBERS = re.compile(r"\[[-+.\deE,\s]+\]")
_SMALL = re.compile(r'\{\n\s+"\w+": [-+.\deE]+\s+\}')
"""An object of one number."""


def write_json(path: Path, value: Any) -> None:
    """Write atomically (see ``replacing``). Lists of numbers, and objects of one, take one line.

    Raises:
        ValueError: a number is not finite. ``UnwritableFile``: see ``replacing``.

    """
    text = json.dumps(value, indent=1, allow_nan=False)
    text = _SMALL.sub(_on_one_line, _NUMBERS.sub(_on_one_line, text))
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Write atomically (see ``replacing``)."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside ``path``, for the block to write; it takes ``path``'s place at the end.

    Folders are made as needed. Where the block fails, or the disk is full, ``path`` stays as it
    was and nothing lies beside it; a killed process leaves no half file under ``path`` either.

    Raises:
        UnwritableFile: the file cannot be written; the message says why.

    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())  # a full disk or a power cut must not show after the rename
        partial.replace(path)
    except OSError as error:
        raise UnwritableFile(f"cannot write to {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """What ``write_json`` wrote.

    Raises:
        UnreadableFile: the file is cut short, no JSON, or holds NaN or an infinity.

    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise UnreadableFile(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:  # json.JSONDecodeError and UnicodeDecodeError among them
        raise UnreadableFile(
            f"{path} is damaged ({error}); delete it, and the command that made it makes it anew"
        ) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}")


def _on_one_line(numbers: re.Match[str]) -> str:
    return " ".join(numbers[0].split())


def read_record_of(path: Path, kinds: Mapping[str, Iterable[str]], what: str) -> dict[str, Any]:
    """A record of one of ``kinds`` that has every field of its kind.

    Args:
        path: of its file.
        kinds: by kind, what a report or a resumed study takes from a record.
        what: such records are called so.

    Raises:
        UnreadableFile: it is none, or cut short.

    """
    record = read_json(path)
    kind = record.get("kind") if isinstance(record, dict) else None
    why = f"its kind is {kind!r}" if kind else "it has no kind"
    if isinstance(kind, str) and kind in kinds:
        why = next((f"it has no {name}" for name in kinds[kind] if name not in record), "")
    if why:
        raise UnreadableFile(f"{path} is no {what} record ({why}); delete it, or move it elsewhere")
    return record
