"""``kv-eviction bench``: loads on engines of their own, stock vLLM against eviction."""

from __future__ import annotations

import argparse
from typing import Any

from .sweeps import add_sweep_flags, run_sweep, study_folder


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "bench",
        help="throughput of stock vLLM and of methods on equal loads; resumes where it stopped",
        description="Starts an engine per set of server-wide settings, each in a process of its "
        "own, runs the study's load on it under every method and seed, and writes a report. Runs "
        "that are there already are not run again. Exit status 1: some runs failed.",
    )
    add_sweep_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the study and report on it; 1: some runs failed, or a record could not be written."""
    from ..report.bench import report_bench_study
    from ..study.bench_study import BenchStudy
    from ..sweep.bench import BenchSweep

    study = BenchStudy.read(arguments.study)
    sweep = BenchSweep(study, study_folder(arguments, study.name), arguments.redo)
    return run_sweep(sweep, report_bench_study)
