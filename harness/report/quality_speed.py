"""The page that joins quality and speed of one configuration: a table, a figure, its numbers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ..analysis.quality_speed import Joined, Point, join
from ..errors import UsageError
from ..records.files import write_json
from ..records.stored import EXPERIMENT, read_experiment, read_records
from .bench import bench_caption, bench_results
from .cells import level_shown, percent, times
from .lines import caption, granularity_told, provenance_line
from .page import Figure, write_pages
from .quality_speed_figure import draw_quality_speed
from .tables import Row, markdown

PAGE = "quality-speed"
"""What the page, its figure and its numbers are called in the folder of quality."""
_TOLD = (
    "A row is one configuration: model, lengths, chunk, block size, granularity, scores and dtypes "
    "are the same on both sides, by their records. *Perplexity*: its change against dense over the "
    "tokens predicted after the first eviction, with its 95% interval. *Output of stock*: the "
    "geometric mean of the ratios of equal seeds, with its 95% t interval. *KV memory*: of a "
    "request, on average over its steps, in the runs of quality. *Blocks*: the same in blocks, in "
    "the runs of quality and of speed. *Front*: no other row, stock among them, is better in both, "
    "by the means alone."
)
_MADE_BY = (
    "`kv-eviction report DIR --speed SPEED_DIR` makes this page, its figure and its numbers from "
    "the records of both folders."
)


def report_quality_speed(quality: Path, speed: Path) -> None:
    """Write the joint page, figure and numbers into the folder of quality.

    Args:
        quality: of records of perplexity, one comparison.
        speed: of a bench study of batches.

    Raises:
        UsageError: no records, ones that cannot be read, or ones that do not join.

    """
    joined, told = _read(quality, speed)
    write_json(quality / f"{PAGE}.json", asdict(joined))
    draw_quality_speed(joined, quality / PAGE)
    parts: list[str | Figure] = [
        f"# {quality.resolve().name}: quality and speed of one configuration",
        told,
        _TOLD,
        markdown(joined_rows(joined)),
        Figure(
            PAGE,
            "Perplexity after the first eviction against output throughput and against KV memory; "
            "bars: 95%.",
        ),
    ]
    if joined.alone:
        parts.append(f"Measured on one side only: {', '.join(joined.alone)}.")
    write_pages(quality, parts, name=PAGE, made_by=_MADE_BY)


def quality_speed_table(quality: Path, speed: Path) -> str:
    """The page's table, and what it was measured on.

    Raises:
        UsageError: see ``report_quality_speed``.

    """
    joined, told = _read(quality, speed)
    return f"{told}\n\n{markdown(joined_rows(joined))}"


def _read(quality: Path, speed: Path) -> tuple[Joined, str]:
    """What joins of two folders, and on what both were measured, in lines."""
    for folder in (quality, speed):
        _check_plain(folder)
    records, (bench, batches) = read_records(quality), bench_results(speed)
    joined = join(records, batches, (str(quality), str(speed)))
    first, batch = records[0], batches[0]
    told = (
        f"Quality: {caption(first)}{granularity_told(first)}; {provenance_line(first)}\n"
        f"Speed: {bench_caption(batch, bench)}; {provenance_line(batch)}"
    )
    return joined, told


def joined_rows(joined: Joined) -> list[Row]:
    """Header and rows, dense and stock first."""
    table: list[Row] = [
        (
            "method",
            "granularity",
            "sparsity",
            "perplexity",
            "output of stock",
            "KV memory, MiB",
            "of dense",
            "blocks, quality and speed",
            "front",
        ),
    ]
    memory = f"{joined.dense_memory_mib:.1f}"
    front = _fronts(joined.reference_on_speed_front, joined.reference_on_memory_front)
    table.append(("dense, stock", "-", "-", "-", "1.00x", memory, "100%", "-", front))
    return [*table, *map(_row, joined.points)]


def _row(point: Point) -> Row:
    blocks = [point.blocks, point.blocks_of_speed]
    return (
        point.method,
        point.granularity,
        level_shown(point.level),
        percent(point.change),
        times(point.speed, "x"),
        f"{point.memory_mib:.1f}",
        f"{100 * point.memory_share:.1f}%",
        ", ".join("-" if value is None else f"{value:.1f}" for value in blocks),
        _fronts(point.on_speed_front, point.on_memory_front),
    )


def _fronts(speed: bool, memory: bool) -> str:
    return ", ".join(["speed"] * speed + ["memory"] * memory) or "-"


def _check_plain(folder: Path) -> None:
    """Refuse a study that varies something, as its records lie in folders below."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; name the folder of an experiment")
    path = folder / EXPERIMENT
    points = read_experiment(path)["comparisons"] if path.is_file() else []
    if varied := [point["folder"] for point in points if point["varied"]]:
        raise UsageError(
            f"{folder} varies something; name the folder of one point, like {folder / varied[0]}"
        )
