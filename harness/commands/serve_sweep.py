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
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the study and report on it."""
    from ..report.serving import report_serving
    from ..study.serving_study import ServingStudy
    from ..sweep.serving import run_sweep

    study = ServingStudy.read(arguments.study)
    folder = arguments.output_dir / arguments.study.stem
    try:
        with polite_ends():
            result = run_sweep(study, folder, lambda line: print(line, file=sys.stderr, flush=True))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_INTERRUPTED) from None
    for key, reason in result.failed:
        print(f"kv-eviction: {key}: {reason}", file=sys.stderr)
    if result.finished or result.skipped:
        try:
            report_serving(folder)
            print(f"records, report.md and report.html: {folder}")
        except UnwritableFile as error:  # a full disk: what was measured is kept or told above
            print(f"kv-eviction: {error}", file=sys.stderr)
            return 1
    if result.skipped:
        print(f"{len(result.skipped)} runs were there already")
    if result.interrupted:
        raise KeyboardInterrupt(_INTERRUPTED)
    return 1 if result.failed else 0
