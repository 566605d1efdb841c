"""Recorded arrivals: Azure's LLM inference trace (CSV) and Mooncake's (JSONL). Pure but reading.

Azure Public Dataset, ``AzureLLMInferenceTrace_*.csv`` (2023, 2024): ``TIMESTAMP, ContextTokens,
GeneratedTokens``. Mooncake (FAST'25): ``timestamp`` (ms), ``input_length``, ``output_length`` and
``hash_ids``, one id per 512 prompt tokens; equal ids are equal tokens, so prefixes are shared as
they were in production.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .lengths import MOST_TOKENS

MOONCAKE_BLOCK = 512
"""Prompt tokens that one hash id stands for."""


@dataclass(frozen=True)
class TraceEntry:
    """One recorded request; ``seconds`` from the first entry of its trace."""

    seconds: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()
    """Whole numbers of at least 0, whatever the trace calls its blocks."""


def read_trace(path: Path) -> list[TraceEntry]:
    """Entries in order of time; the format follows from the suffix (``.csv``, ``.jsonl``).

    Raises:
        UsageError: no such file, or not one of the two formats; the message names the entry.

    """
    readers = {".csv": _azure, ".jsonl": _mooncake}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"trace {path} is neither .csv (Azure) nor .jsonl (Mooncake)")
    try:
        # Spreadsheets put a byte-order mark first; it is no part of the first column's name.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UsageError(f"cannot read trace {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"cannot read trace {path}: it is not UTF-8 ({error.reason})") from None
    entries: list[TraceEntry] = []
    try:
        entries.extend(reader(lines))
    except _EntryError as error:
        raise UsageError(
            f"trace {path}: entry {error.number} is not what the format says ({error})"
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
        UsageError: the trace has fewer entries that fit, or the scale gives no times.

    """
    if not 0 < time_scale < math.inf:
        raise UsageError(f"--time-scale is {time_scale:g}; give a number above 0")
    fitting = [
        entry
        for entry in entries
        if max_tokens is None or entry.input_length + max(1, entry.output_length) <= max_tokens
    ]
    if len(fitting) < num_requests:
        limit = "" if max_tokens is None else f" of at most {max_tokens} tokens"
        raise UsageError(
            f"the trace has {len(fitting)} entries{limit}, fewer than --num-requests {num_requests}"
        )
    first = fitting[0].seconds
    times = [(entry.seconds - first) / time_scale for entry in fitting[:num_requests]]
    if not math.isfinite(times[-1]):
        raise UsageError(f"--time-scale {time_scale:g} gives times that are no numbers; raise it")
    return [replace(entry, seconds=at) for entry, at in zip(fitting, times, strict=False)]


class _EntryError(Exception):
    """What is wrong with entry ``number``, counted from 1."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(reason)
        self.number = number


def _azure(lines: list[str]) -> Iterator[TraceEntry]:
    rows = iter(csv.DictReader(lines, skipinitialspace=True))
    zones: set[bool] = set()
    for number in count(1):
        try:
            row = next(rows, None)
            if row is None:
                return
            entry = _azure_entry(row, zones)
        except (csv.Error, ValueError, OverflowError) as error:
            raise _EntryError(number, str(error)) from None
        yield entry


def _azure_entry(row: dict[str, Any], zones: set[bool]) -> TraceEntry:
    stamp = datetime.fromisoformat(_text(row, "TIMESTAMP"))
    zones.add(stamp.tzinfo is not None)
    if len(zones) > 1:
        raise ValueError("TIMESTAMP has a time zone in some entries and none in others")
    if stamp.tzinfo is None:
        stamp = stamp.replace(tzinfo=UTC)  # any zone will do, as long as it has no summer time
    return TraceEntry(
        stamp.timestamp(),
        _tokens("ContextTokens", _text(row, "ContextTokens"), least=1),
        _tokens("GeneratedTokens", _text(row, "GeneratedTokens"), least=0),
    )


def _text(row: dict[str, Any], name: str) -> str:
    if not row.get(name):
        raise ValueError(f"it has no {name}")
    return row[name].strip()


def _mooncake(lines: list[str]) -> Iterator[TraceEntry]:
    for number, line in enumerate(filter(str.strip, lines), start=1):
        try:
            yield _mooncake_entry(json.loads(line))
        except RecursionError:
            raise _EntryError(number, "it is nested too deeply") from None
        except ValueError as error:
            raise _EntryError(number, str(error)) from None


def _mooncake_entry(row: Any) -> TraceEntry:
    if not isinstance(row, dict):
        raise ValueError("it is no mapping")
    for name in ("timestamp", "input_length", "output_length"):
        if name not in row:
            raise ValueError(f"it has no {name}")
    hash_ids = row.get("hash_ids") or []
    if not isinstance(hash_ids, list):
        raise ValueError(f"hash_ids is {hash_ids!r:.40}, not a list")
    return TraceEntry(
        _milliseconds(row["timestamp"]) / 1000.0,
        _tokens("input_length", row["input_length"], least=1),
        _tokens("output_length", row["output_length"], least=0),
        tuple(map(_hash_id, hash_ids)),
    )


def _milliseconds(value: Any) -> float:
    try:
        time = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        time = math.nan
    if not math.isfinite(time):
        raise ValueError(f"timestamp is {value!r:.40}, not a finite number of milliseconds")
    return time


def _tokens(name: str, value: Any, least: int) -> int:
    """A number of tokens; ``"374"`` and ``374.0`` are 374."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not number.is_integer():
        raise ValueError(f"{name} is {value!r:.40}, not a whole number of tokens")
    if not least <= number <= MOST_TOKENS:
        raise ValueError(f"{name} is {value!r:.40}, out of range")
    return int(number)


def _hash_id(value: Any) -> int:
    """A whole number of at least 0 that stands for a block's name; such numbers are themselves.

    An id only says which blocks are equal: strings and negative numbers do that as well.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is int and value >= 0:
        return value
    if type(value) is int or isinstance(value, str):
        text = f"{type(value).__name__}:{value}".encode(errors="surrogatepass")
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())
    raise ValueError(f"hash_ids holds {value!r:.40}, not a whole number or a string")
