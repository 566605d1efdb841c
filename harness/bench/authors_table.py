"""The authors' table: each claim of theirs, and what records say of it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from ..analysis.change import Interval
from ..analysis.claims import (
    FAILS,
    HOLDS,
    MEASURES,
    OPEN,
    PERPLEXITY,
    THROUGHPUT,
    Limit,
    limit_of,
    memory_share,
    perplexity_change,
    throughput_ratio,
    verdict,
)
from ..records.specifications import DENSE, level
from ..records.stored import read_records
from ..report.bench import bench_caption, bench_results
from ..report.cells import percent
from ..report.lines import caption, granularity_told, provenance_line
from ..report.tables import Row, markdown
from ..study.evidence import Evidence, read_evidence
from ..study.evidence import Row as Beside
from ..study.expectations import EXPECTATIONS

_NONE = "-"
_NOT_COMPARABLE = "not comparable"
_TITLES = {claim.method: claim.title for claim in EXPECTATIONS}
Column: TypeAlias = tuple[str, str]
"""The method that a claim judges, and the one that it is held against: dense, or another."""
_COLUMNS: tuple[Column, ...] = tuple(
    (claim.method, against)
    for claim in EXPECTATIONS
    for against in (DENSE, claim.ahead_of)
    if against
)


def authors_table(path: Path) -> str:
    """Every claim at every sparsity, what was published, and the records behind the figures.

    Args:
        path: of the file that says which records stand beside the claims
            (``study.evidence.read_evidence``).

    Raises:
        UsageError: the file is wrong, or a folder's records cannot be read or mixed.

    """
    evidence = read_evidence(path, MEASURES)
    read = _Records(path.parent)
    parts = [
        f"A claim *{HOLDS}* where the whole 95% interval lies within it, *{FAILS}* where it lies "
        f"wholly beyond, else it is *{OPEN}*: so is a single run, which has no interval. Memory is "
        "counted and exact. CAB against H2O is judged by its own interval, without the "
        "correction of the hypotheses below."
    ]
    for sparsity in sorted({s for claim in EXPECTATIONS for s in claim.bounds}):
        parts += [f"Sparsity {sparsity:g}:", markdown(_claims(evidence, sparsity, read))]
    parts += [
        "\n".join(f"- *{name}*: {' '.join(text.split())}" for name, text in evidence.why.items()),
        "What was published:",
        markdown(_published(evidence), numbers=False),
        "The records:\n" + "\n".join(read.machines(evidence.rows)),
        markdown(read.conditions(evidence.rows), numbers=False),
    ]
    return "\n\n".join(parts)


def _claims(evidence: Evidence, sparsity: float, read: _Records) -> list[Row]:
    table: list[Row] = [("measured", *map(_head, _COLUMNS))]
    for measure in MEASURES:
        rows = [row for row in evidence.rows if row.measure == measure]
        limits = {column: _limit(measure, column, sparsity) for column in _COLUMNS}
        expected = (_expected(measure, limits[column]) for column in _COLUMNS)
        table.append((f"**{measure}, expected**", *expected))
        for row in rows:
            cells = [
                _cell(measure, read.measured(row, column, sparsity), limits[column])
                for column in _COLUMNS
            ]
            if any(cell != _NONE for cell in cells):
                table.append((row.name, *cells))
    return table


def _head(column: Column) -> str:
    method, against = column
    return _TITLES[method] + ("" if against == DENSE else f" against {_TITLES[against]}")


def _limit(measure: str, column: Column, sparsity: float) -> Limit | None:
    method, against = column
    if against != DENSE:
        return Limit(0.0) if measure == PERPLEXITY else None
    bounds = next(claim.bounds for claim in EXPECTATIONS if claim.method == method)
    return limit_of(measure, bounds[sparsity]) if sparsity in bounds else None


def _expected(measure: str, limit: Limit | None) -> str:
    if limit is None:
        return _NONE
    if not limit.value:
        return "less"
    if measure == PERPLEXITY:
        return f"at most +{100 * limit.value:g}%"
    return f"at least {limit.value:g}x" if limit.at_least else f"at most {100 * limit.value:g}%"


def _cell(measure: str, measured: Interval | None, limit: Limit | None) -> str:
    if measured is None:
        return _NONE
    told = _told(measure, measured)
    return told if limit is None else f"{told}, {verdict(measured, limit)}"


def _told(measure: str, measured: Interval) -> str:
    if measure == PERPLEXITY:
        return percent(measured)
    if measure != THROUGHPUT:
        return f"{100 * measured.value:.1f}%"
    value, low, high = measured
    return f"{value:.2f}x" + ("" if low is None else f" [{low:.2f}, {high:.2f}]")


def _published(evidence: Evidence) -> list[Row]:
    table: list[Row] = [("method", "published", "conditions", "beside it")]
    for claim in EXPECTATIONS:
        why = evidence.not_comparable.get(claim.method)
        beside = _NONE if why is None else f"{_NOT_COMPARABLE}: {' '.join(why.split())}"
        table.append((f"{claim.title} ({claim.source})", claim.published, claim.conditions, beside))
    return table


class _Records:
    """What the folders of evidence hold, each read once."""

    def __init__(self, results: Path) -> None:
        self._results = results
        self._offline = cache(read_records)
        self._bench = cache(bench_results)

    def measured(self, row: Beside, column: Column, sparsity: float) -> Interval | None:
        """The figure of a cell; None where the records lack a side of it."""
        method, against = (DENSE if m == DENSE else row.methods.get(m) for m in column)
        if method is None or against is None:
            return None
        name = level(sparsity, None)
        if row.measure == THROUGHPUT:
            results, _ = self._bench(row.records)
            return throughput_ratio(results, method, name) if against == DENSE else None
        records = self._offline(row.records)
        if row.measure == PERPLEXITY:
            return perplexity_change(records, method, name, against)
        return memory_share(records, row.measure, method, name) if against == DENSE else None

    def conditions(self, rows: Iterable[Beside]) -> list[Row]:
        """Header and rows: each folder once, and what its records were measured on."""
        table: list[Row] = [("records", "measured on")]
        for folder, measure in _folders(rows).items():
            name = folder.relative_to(self._results)
            table.append((f"[{name}]({name})", self._condition(folder, measure)))
        return table

    def machines(self, rows: Iterable[Beside]) -> list[str]:
        """Hardware, versions and date of all folders, each once."""
        firsts = (self._first(*folder) for folder in _folders(rows).items())
        return list(dict.fromkeys(map(provenance_line, firsts)))

    def _condition(self, folder: Path, measure: str) -> str:
        first = self._first(folder, measure)
        if measure == THROUGHPUT:
            return bench_caption(first, self._bench(folder)[0])
        return caption(first) + granularity_told(first)

    def _first(self, folder: Path, measure: str) -> dict[str, Any]:
        return (self._bench(folder)[1] if measure == THROUGHPUT else self._offline(folder))[0]


def _folders(rows: Iterable[Beside]) -> dict[Path, str]:
    return {row.records: row.measure for row in rows}
