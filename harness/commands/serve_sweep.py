"""``kv-eviction serve-sweep``: servers, loads and records of a serving study."""

from __future__ import annotations

import argparse
from typing import Any

from .sweeps import add_sweep_flags, run_sweep, study_folder


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "serve-sweep",
        help="a serving study: servers x loads, records and report; resumes where it stopped",
        description="Starts a server per method and sparsity, loads each at every rate and seed, "
        "and writes a report. Runs that are there already are not run again. Exit status 1: some "
        "runs failed.",
    )
    add_sweep_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the study and report on it; 1: some runs failed, or a record could not be written."""
    from ..report.serving import report_serving_study
    from ..study.serving_study import ServingStudy
    from ..sweep.serving import ServingSweep

    study = ServingStudy.read(arguments.study)
    sweep = ServingSweep(study, study_folder(arguments, study.name), arguments.redo)
    return run_sweep(sweep, report_serving_study)
