"""Tasks of a user's own: a file of prompts with their answers, one JSON object a line."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ...errors import UsageError
from .sample import CONTAINS, EXACT, F1

PREFIX = "jsonl:"
METRICS = (EXACT, CONTAINS, F1)


@dataclass(frozen=True)
class Line:
    """A prompt, and the answers any of which is right."""

    number: int
    """In its file, from 1 on."""
    prompt: str
    answers: tuple[str, ...]
    metric: str
    max_tokens: int | None


def file_of(name: str) -> Path:
    """The file that ``jsonl:FILE`` names."""
    return Path(name.removeprefix(PREFIX)).expanduser()


def sha256_of(path: Path) -> str:
    """Tells two files of one name apart.

    Raises:
        UsageError: it cannot be read.

    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"cannot read the task {path}: {error.strerror or error}") from None


def read_lines(path: Path) -> list[Line]:
    """The lines of a task's file; empty ones are skipped, and fields that are not known.

    A line is ``{"prompt": TEXT, "answers": [TEXT, ...]}``, and may have ``metric`` (of
    ``METRICS``; ``contains`` without) and ``max_tokens`` of the answer.

    Raises:
        UsageError: the file cannot be read, or which line is wrong, and in what.

    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the task {path}: {error}") from None
    lines = [
        _line(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()
    ]
    if not lines:
        raise UsageError(f"the task {path} holds no line; give one prompt a line")
    return lines


def _line(path: Path, number: int, text: str) -> Line:
    def wrong(what: str) -> NoReturn:
        raise UsageError(f"{path}, line {number}: {what}")

    try:
        value: Any = json.loads(text)
    except ValueError:
        wrong('no JSON; give an object like {"prompt": "...", "answers": ["..."]}')
    if not isinstance(value, dict):
        wrong('no JSON object; give one like {"prompt": "...", "answers": ["..."]}')
    prompt, answers = value.get("prompt"), value.get("answers")
    if not isinstance(prompt, str) or not prompt:
        wrong('"prompt" must be a text')
    if (
        not isinstance(answers, list)
        or not answers
        or not all(isinstance(a, str) and a.strip() for a in answers)
    ):
        wrong('"answers" must be a list of texts, none of them empty')
    metric = value.get("metric", CONTAINS)
    if metric not in METRICS:
        wrong(f'"metric" is {metric!r}; use one of: {", ".join(METRICS)}')
    max_tokens = value.get("max_tokens")
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        wrong(f'"max_tokens" is {max_tokens!r}; give a whole number of at least 1')
    return Line(number, prompt, tuple(answers), metric, max_tokens)
