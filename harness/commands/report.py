"""``kv-eviction report DIR``: tables, figures and pages anew from an experiment's records."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UsageError


def add_parser(commands: Any) -> None:
    """Add the subcommand to ``commands`` (of ``ArgumentParser.add_subparsers``)."""
    report = commands.add_parser(
        "report", help="tables, figures and pages anew from an experiment's records"
    )
    report.add_argument("folder", type=Path, metavar="DIR", help="folder of an experiment")
    report.add_argument(
        "--speed",
        type=Path,
        metavar="DIR",
        help="folder of a bench study of the same configurations: join its throughput with the "
        "perplexity of the first folder, in a page of its own",
    )
    report.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the report and say where it is."""
    from ..records.stored import study_kind
    from ..report.bench import report_bench_study
    from ..report.experiment import report_experiment
    from ..report.quality_speed import PAGE, report_quality_speed
    from ..report.serving import report_serving_study

    if not arguments.folder.is_dir():
        raise UsageError(f"{arguments.folder} is no folder; name the folder of an experiment")
    if arguments.speed is not None:
        report_quality_speed(arguments.folder, arguments.speed)
        print(f"{arguments.folder}/{PAGE}.md, {PAGE}.html")
        return 0
    makers: dict[str | None, Callable[[Path], Any]] = {
        "serving": report_serving_study,
        "bench": report_bench_study,
    }
    makers.get(study_kind(arguments.folder), report_experiment)(arguments.folder)
    print(f"{arguments.folder}/report.md, report.html")
    return 0
