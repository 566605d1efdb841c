"""``kv-eviction model``: prepare an embedded model and print its folder."""

from __future__ import annotations

import argparse
from typing import Any

from ..inputs.models import DEFAULT_MODEL


def add_parser(commands: Any) -> None:
    """Add the subcommand to ``commands`` (of ``ArgumentParser.add_subparsers``)."""
    model = commands.add_parser("model", help="prepare an embedded model and print its folder")
    model.add_argument("name", choices=[DEFAULT_MODEL])
    model.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the folder, for ``vllm serve`` or ``vllm.LLM``."""
    from ..inputs.models import resolve_model

    print(resolve_model(arguments.name))
    return 0
