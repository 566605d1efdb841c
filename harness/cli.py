"""The command line: ``kv-eviction`` = ``python -m harness``. Dispatches, and turns errors into
exit statuses; each subcommand is a module of ``commands``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vllm_plugins.parsing import EvictionConfigError

from .commands import bench, load, model, offline, report, serve, serve_sweep
from .errors import UsageError

COMMANDS = (offline, serve, load, serve_sweep, bench, report, model)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 = done, 2 = something the user gave is wrong, 130 = interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (UsageError, EvictionConfigError) as error:
        print(f"kv-eviction: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        print(f"kv-eviction: {str(interruption) or 'interrupted'}", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kv-eviction", description="KV-cache eviction inside stock vLLM, and what it costs."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
