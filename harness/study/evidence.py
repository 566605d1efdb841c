"""Which records stand beside the authors' claims, as a file states it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .expectations import EXPECTATIONS
from .settings import read_study

_PARTS = ("rows", "why", "not_comparable")
_OF_A_ROW = {"measure", "name", "records"}


@dataclass(frozen=True)
class Row:
    """One folder of records beside one measure."""

    measure: str
    name: str
    """For a reader."""
    records: Path
    methods: Mapping[str, str]
    """A claim's method to what the records call it; those without records are missing."""


@dataclass(frozen=True)
class Evidence:
    """All that stands beside the claims of ``EXPECTATIONS``."""

    rows: Sequence[Row]
    why: Mapping[str, str]
    """Prose by measure."""
    not_comparable: Mapping[str, str]
    """By method, why what was published stands beside no figure."""


def read_evidence(path: Path, measures: Sequence[str]) -> Evidence:
    """A file with ``rows``, ``why`` and ``not_comparable``; folders are relative to it.

    Raises:
        UsageError: the first thing that is wrong, in one sentence.

    """
    stated = read_study(path)
    if unknown := [name for name in stated if name not in _PARTS]:
        raise UsageError(f"{path} has {unknown[0]!r}; it takes {', '.join(_PARTS)}")
    known = [claim.method for claim in EXPECTATIONS]
    evidence = Evidence(
        [_row(path, row, measures, known) for row in stated.get("rows") or ()],
        _texts(path, "why", stated.get("why") or {}, measures),
        _texts(path, "not_comparable", stated.get("not_comparable") or {}, known),
    )
    for claim in EXPECTATIONS:
        if claim.published != "-" and claim.method not in evidence.not_comparable:
            raise UsageError(f"{path} lacks {claim.method} under not_comparable; say why it is")
    return evidence


def _row(path: Path, row: Any, measures: Sequence[str], known: Sequence[str]) -> Row:
    names = set(row) if isinstance(row, Mapping) else set()
    if names - {"methods"} != _OF_A_ROW:
        raise UsageError(f"{path}: {row!r} is no row; give {', '.join(sorted(_OF_A_ROW))}")
    if row["measure"] not in measures:
        raise UsageError(
            f"{path}: {row['measure']!r} is no measure; choose from: {', '.join(measures)}"
        )
    methods = row.get("methods", {method: method for method in known})
    if strange := [method for method in methods if method not in known]:
        raise UsageError(f"{path}: nobody claimed anything about {strange[0]!r}")
    return Row(row["measure"], row["name"], path.parent / row["records"], methods)


def _texts(path: Path, part: str, texts: Any, known: Sequence[str]) -> Mapping[str, str]:
    if not isinstance(texts, Mapping) or not all(isinstance(t, str) for t in texts.values()):
        raise UsageError(f"{path}: {part} must be a mapping to texts")
    if strange := [name for name in texts if name not in known]:
        raise UsageError(f"{path}: {part} of {strange[0]!r}; choose from: {', '.join(known)}")
    return texts
