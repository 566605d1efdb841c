"""What the commands of YAML studies share: flags, a sweep from start to report, exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UnwritableFile
from .interrupts import polite_ends

if TYPE_CHECKING:
    from ..sweep.loop import Sweep

_GOES_ON = "finished runs are kept, the same command resumes"


def add_sweep_flags(parser: argparse.ArgumentParser) -> None:
    """The study's file, where its folder goes, and ``--redo``."""
    parser.add_argument("study", type=Path, metavar="STUDY.yaml")
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="the study's folder goes here, under its name or the file's [runs]",
    )
    parser.add_argument(
        "--redo", action="store_true", help="measure again what other code or settings measured"
    )


def study_folder(arguments: argparse.Namespace, name: str | None) -> Path:
    """Where a study's records go."""
    return arguments.output_dir / (name or arguments.study.stem)


def run_sweep(sweep: Sweep, report: Callable[[Path], Any]) -> int:
    """Measure what is missing, then report; 1: some runs failed, or a record cannot be written.

    Raises:
        KeyboardInterrupt: with what it means for what is measured.

    """
    from ..records.output import RecordElsewhere

    for note in sweep.notes:
        print(f"kv-eviction: {note}", file=sys.stderr)
    ended = None
    try:
        with polite_ends():
            sweep.run(_say)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {_GOES_ON}") from None
    except (RecordElsewhere, UnwritableFile) as error:
        ended = str(error)
    for name, reason in sweep.failures:
        print(f"kv-eviction: {name}: {reason}", file=sys.stderr)
    if ended:
        print(f"kv-eviction: {ended}; {_GOES_ON}", file=sys.stderr)
    if sweep.session.runs_done or sweep.session.runs_skipped:
        try:
            report(sweep.folder)
            print(f"records, report.md and report.html: {sweep.folder}")
        except UnwritableFile as error:  # a full disk: what was measured is kept or told above
            print(f"kv-eviction: {error}", file=sys.stderr)
            return 1
    if sweep.session.runs_skipped:
        print(f"{sweep.session.runs_skipped} runs were there already")
    return 1 if sweep.failures or ended else 0


def _say(label: str, finished: int) -> None:
    """What begins is told in a line; what takes long has a bar of its own."""
    if not finished:
        print(label, file=sys.stderr, flush=True)
