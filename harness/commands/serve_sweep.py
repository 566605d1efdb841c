"""``kv-eviction serve-sweep``: servers, loads and records of a serving study."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..errors import UnwritableFile
from .interrupts import polite_ends

_INTERRUPTED = "interrupted; finished runs are kept, the same command resumes"


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "serve-sweep",
        help="a serving study: servers x loads, records and report; resumes where it stopped",
        description="Starts a server per method and sparsity, loads each at every rate and seed, "
        "and writes a report. Runs that are there already are not run again. Exit status 1: some "
        "runs failed.",
    )
    parser.add_argument("study", type=Path, metavar="STUDY.yaml")
    parser.add_argument("--output-dir", type=Path, default=Path("runs"), metavar="DIR",
        help="the study's folder goes here, under the file's name [runs]")  # fmt: skip
    parser.add_argument("--redo", action="store_true",
        help="measure again what other code or settings measured")  # fmt: skip
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the study and report on it; 1: some runs failed, or a record could not be written."""
    from ..records.output import RecordElsewhere
    from ..report.serving import report_serving_study
    from ..study.serving_study import ServingStudy
    from ..sweep.serving import ServingSweep

    study = ServingStudy.read(arguments.study)
    sweep = ServingSweep(study, arguments.output_dir / arguments.study.stem, arguments.redo)
    for note in sweep.notes:
        print(f"kv-eviction: {note}", file=sys.stderr)
    ended = None
    try:
        with polite_ends():
            sweep.run(_say)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_INTERRUPTED) from None
    except (RecordElsewhere, UnwritableFile) as error:
        ended = str(error)
    for name, reason in sweep.failures:
        print(f"kv-eviction: {name}: {reason}", file=sys.stderr)
    if ended:
        print(f"kv-eviction: {ended}; finished runs are kept, the same command resumes",
              file=sys.stderr)  # fmt: skip
    if sweep.session.runs_done or sweep.session.runs_skipped:
        try:
            report_serving_study(sweep.folder)
            print(f"records, report.md and report.html: {sweep.folder}")
        except UnwritableFile as error:  # a full disk: what was measured is kept or told above
            print(f"kv-eviction: {error}", file=sys.stderr)
            return 1
    if sweep.session.runs_skipped:
        print(f"{sweep.session.runs_skipped} runs were there already")
    return 1 if sweep.failures or ended else 0


def _say(label: str, finished: int) -> None:
    """Loads show a bar of their own; what begins is told in a line."""
    if not finished:
        print(label, file=sys.stderr, flush=True)
