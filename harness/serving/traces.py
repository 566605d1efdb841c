"""Recorded arrivals: Azure's LLM inference trace (CSV) and Mooncake's (JSONL). Pure but reading.

Azure Public Dataset, ``AzureLLMInferenceTrace_*.csv`` (2023): ``TIMESTAMP, ContextTokens,
GeneratedTokens``. Mooncake (FAST'25): ``timestamp`` (ms), ``input_length``, ``output_length`` and
``hash_ids``, one id per 512 prompt tokens; equal ids are equal tokens, so prefixes are shared as
they were in production.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from ..errors import UsageError

MOONCAKE_BLOCK = 512
"""Prompt tokens that one hash id stands for."""


@dataclass(frozen=True)
class TraceEntry:
    """One recorded request; ``seconds`` from the first entry of its trace."""

    seconds: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


def read_trace(path: Path) -> list[TraceEntry]:
    """Entries in order of time; the format follows from the suffix (``.csv``, ``.jsonl``).

    Raises:
        UsageError: no such file, or not one of the two formats; the message names the line.

    """
    readers = {".csv": _azure, ".jsonl": _mooncake}
    if path.suffix not in readers:
        raise UsageError(f"trace {path} is neither .csv (Azure) nor .jsonl (Mooncake)")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read trace {path}: {error}") from None
    entries = []
    try:
        for entry in readers[path.suffix](lines):
            if entry.input_length < 1 or entry.output_length < 0:
                raise ValueError("a length out of range")
            entries.append(entry)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"trace {path}: entry {len(entries) + 1} is not what the format says ({error!r})"
        ) from None
    if not entries:
        raise UsageError(f"trace {path} holds no entry")
    entries.sort(key=lambda entry: entry.seconds)
    first = entries[0].seconds
    return [replace(entry, seconds=entry.seconds - first) for entry in entries]


def replay(
    entries: Sequence[TraceEntry], num_requests: int, time_scale: float, max_tokens: int | None
) -> list[TraceEntry]:
    """The first ``num_requests`` entries that fit, ``time_scale`` times as fast as recorded.

    Args:
        entries: as ``read_trace`` gives them.
        num_requests: how many are wanted.
        time_scale: 2 halves every gap.
        max_tokens: entries with more prompt and output tokens than this are left out; the gaps
            between the others stay. None: no limit.

    Raises:
        UsageError: the trace has fewer entries that fit.

    """
    if not time_scale > 0:
        raise UsageError(f"--time-scale is {time_scale:g}; give a number above 0")
    fitting = [
        entry
        for entry in entries
        if max_tokens is None or entry.input_length + max(1, entry.output_length) <= max_tokens
    ]
    if len(fitting) < num_requests:
        raise UsageError(
            f"the trace has {len(fitting)} entries of at most {max_tokens} tokens, fewer than "
            f"--num-requests {num_requests}"
        )
    first = fitting[0].seconds
    return [
        replace(entry, seconds=(entry.seconds - first) / time_scale)
        for entry in fitting[:num_requests]
    ]


def _azure(lines: list[str]):
    for row in csv.DictReader(lines):
        yield TraceEntry(
            datetime.fromisoformat(row["TIMESTAMP"]).replace(tzinfo=UTC).timestamp(),
            int(row["ContextTokens"]),
            int(row["GeneratedTokens"]),
        )


def _mooncake(lines: list[str]):
    for line in filter(str.strip, lines):
        row = json.loads(line)
        yield TraceEntry(
            row["timestamp"] / 1000.0,
            int(row["input_length"]),
            int(row["output_length"]),
            tuple(row.get("hash_ids", ())),
        )
