"""Engine arguments as flags of ``vllm serve``. Pure."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any


def serve_flags(arguments: Mapping[str, Any]) -> list[str]:
    """``{"block_size": 32, "enable_prefix_caching": False}`` to the flags of the command line.

    Mappings become JSON, lists several words, truth values ``--name`` or ``--no-name``; None
    leaves a flag out.
    """
    flags: list[str] = []
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, Mapping):
            flags += [flag, json.dumps(value, separators=(",", ":"))]
        elif isinstance(value, list | tuple):
            flags += [flag, *map(str, value)]
        else:
            flags += [flag, str(value)]
    return flags


def shell_line(command: Sequence[str]) -> str:
    """A command as one pastes it into a shell."""
    return " ".join(map(shlex.quote, command))
