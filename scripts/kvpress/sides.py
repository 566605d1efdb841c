"""Both sides' records, checked to be of the same windows. This project's half of the study."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.analysis.aggregate import independent
from harness.analysis.perplexity import counts, perplexity, total
from harness.analysis.statistics import paired_test
from harness.errors import UsageError
from harness.records.files import read_json
from harness.records.stored import EXPERIMENT, PERPLEXITY_RECORDS, read_experiment, read_records

Record = dict[str, Any]
Place = tuple[int, int]
"""A window's seed and first token."""
Level = tuple[str, int | None]
"""A method, and the tokens that are kept of the prompt; None: all, as dense does."""
_SAME = ("versions", "hardware", "code", "dtype", "model", "text", "context_length", "min_context")
"""What all records of kvpress must agree in."""


@dataclass(frozen=True)
class Scored:
    """The windows of one method under one budget, over all seeds."""

    windows: Mapping[Place, Mapping[str, Any]]

    @property
    def perplexity(self) -> float:
        """Over all scored tokens."""
        return perplexity(map(total, self.windows.values()))

    def minus(self, other: Scored, length: int, queries: range | None = None) -> dict[str, Any]:
        """``paired_test`` of this one's loss less the other's, nats per token, by window.

        Args:
            other: of the same windows.
            length: tokens of a window; windows that share a token are tested once.
            queries: only the predictions of these queries, whole sums; None: all that are scored.

        Raises:
            UsageError: the two are of other windows.

        """
        if self.windows.keys() != other.windows.keys():
            raise UsageError("two methods were measured on other windows; measure both anew")
        places = independent(self.windows, length)
        first, second = (
            [_loss(side.windows[place], queries) for place in places] for side in (other, self)
        )
        return paired_test(first, second, [seed for seed, _ in places])


@dataclass(frozen=True)
class Sides:
    """Figures of both."""

    theirs: Mapping[Level, Scored]
    ours: Mapping[int, Mapping[Level, Scored]]
    """By chunk."""
    their_record: Record
    our_record: Record
    """One of each, for what all of a side have in common."""

    @property
    def prompt(self) -> int:
        """Tokens that are compressed at once."""
        return self.their_record["min_context"] - 1

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.their_record["context_length"]

    @property
    def budgets(self) -> list[int]:
        """Tokens kept, most first."""
        return sorted({kept for _, kept in self.theirs if kept is not None}, reverse=True)


def read_sides(folder: Path) -> Sides:
    """The records below ``folder``: this project's in ``ours``, kvpress's in ``theirs``.

    Raises:
        UsageError: one side is not there, or the two are not of the same windows.

    """
    points = _read_ours(folder / "ours")
    theirs = _read_theirs(folder / "theirs")
    ours = [record for records in points.values() for record in records]
    _check_windows(ours, theirs)
    prompt = theirs[0]["min_context"] - 1
    if prompt not in points:
        raise UsageError(
            f"{folder / 'ours'} has no point with --prefill-chunk {prompt}, which decides once as "
            "kvpress does; measure it too"
        )
    return Sides(
        theirs=_by_level((r["method"], _kept(r, prompt), r) for r in theirs),
        ours={
            chunk: _by_level((r["method"], r["budget_tokens"], r) for r in records)
            for chunk, records in points.items()
        },
        their_record=theirs[0],
        our_record=points[prompt][0],
    )


def _loss(window: Mapping[str, Any], queries: range | None) -> float:
    sums, sizes = window["log_likelihoods"], counts(window)
    if queries is not None:
        chunk = window["predictions_per_entry"]
        if queries.start % chunk or queries.stop % chunk:
            raise UsageError(f"sums over {chunk} queries do not tell those of {queries}")
        part = slice(queries.start // chunk, queries.stop // chunk)
        sums, sizes = sums[part], sizes[part]
    return -math.fsum(sums) / sum(sizes)


def _read_ours(folder: Path) -> dict[int, list[Record]]:
    path = folder / EXPERIMENT
    points = read_experiment(path)["comparisons"] if path.is_file() else []
    found = {
        point["varied"]["prefill_chunk"]: read_records(folder / point["folder"])
        for point in points
        if "prefill_chunk" in point["varied"]
        # A study that was interrupted lacks points.
        and any((folder / point["folder"]).glob(PERPLEXITY_RECORDS))
    }
    if not found:
        raise UsageError(f"{folder} holds no study that varies prefill_chunk; measure it first")
    return found


def _read_theirs(folder: Path) -> list[Record]:
    records = [read_json(path) for path in sorted(folder.glob("*_seed*.json"))]
    if not records or any(record.get("kind") != "kvpress" for record in records):
        raise UsageError(f"{folder} holds no records of kvpress, or others too; measure them first")
    for record in records[1:]:
        if differing := [name for name in _SAME if record[name] != records[0][name]]:
            raise UsageError(
                f"{folder} mixes records of different {' and '.join(differing)}; measure one kind "
                "anew"
            )
    return records


def _check_windows(ours: list[Record], theirs: list[Record]) -> None:
    """Both sides have read the same tokens and scored the same of them."""
    run = ours[0]["specification"]
    if run.get("min_context") != theirs[0]["min_context"]:
        raise UsageError("the two sides score from another --min-context on; measure one anew")
    if run["engine"]["model"] != theirs[0]["model"]:
        raise UsageError("the two sides are of other models; measure one anew")
    of_ours, of_theirs = (_hashes(side) for side in (ours, theirs))
    if of_ours != of_theirs or (None in {sha for _, sha in of_ours}):
        raise UsageError(
            "the two sides have read other windows (tokens_sha256); export them from the study "
            "that is measured"
        )


def _hashes(records: list[Record]) -> set[tuple[int, str | None]]:
    return {(record["seed"], record.get("tokens_sha256")) for record in records}


def _kept(record: Record, prompt: int) -> int | None:
    return None if record["kept_tokens"] == prompt else record["kept_tokens"]


def _by_level(found: Iterable[tuple[str, int | None, Record]]) -> dict[Level, Scored]:
    levels: dict[Level, dict[Place, Mapping[str, Any]]] = {}
    for method, kept, record in found:
        windows = levels.setdefault((method, kept), {})
        windows |= {(record["seed"], window["start"]): window for window in record["windows"]}
    return {level: Scored(windows) for level, windows in levels.items()}
