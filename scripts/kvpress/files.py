"""JSON files of the kvpress side: windows in, records out. Standard library alone."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

_NUMBERS = re.compile(r"\[[-+.\deE,\s]+\]")


class Refused(Exception):
    """Something that was given is wrong; the message says what to change."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        Refused: there is none.

    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refused(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise Refused(f"{path} holds no JSON object")
    return value


def read_windows(path: Path) -> dict[str, Any]:
    """What ``kv-eviction offline --export-windows`` wrote, whole.

    Raises:
        Refused: it is something else, or tokens are not those that its hash is of.

    """
    exported = read_json(path)
    if exported.get("kind") != "windows" or exported.get("schema_version") != 1:
        raise Refused(f"{path} is no file of kv-eviction offline --export-windows; make it anew")
    if not 1 < exported["min_context"] < exported["context_length"]:
        raise Refused(f"{path} leaves no prompt or nothing to score; give another --min-context")
    for run in exported["runs"]:
        text = json.dumps([w["tokens"] for w in run["windows"]], separators=(",", ":"))
        if hashlib.sha256(text.encode()).hexdigest() != run["tokens_sha256"]:
            raise Refused(f"{path} is damaged: seed {run['seed']} has other tokens; make it anew")
    return exported


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write whole or not at all; a list of numbers takes one line."""
    text = _NUMBERS.sub(lambda m: " ".join(m[0].split()), json.dumps(value, indent=1))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(f"{text}\n", encoding="utf-8")
    partial.replace(path)
