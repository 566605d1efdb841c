"""Engine arguments as flags of ``vllm serve``. Pure."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_plugins import eviction_engine_args

MIDDLEWARE = "vllm_plugins.refusals.http.RequestCheck"


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


def eviction_flags(
    block_size: int, settings: Mapping[str, Any], logits_processors: Sequence[str] = ()
) -> list[str]:
    """Flags of ``vllm serve`` for these eviction settings.

    The engine arguments are those of ``eviction_engine_args``, with the user's own
    ``logits_processors`` beside the validator; the middleware answers HTTP 400 to a request whose
    eviction settings stand where nobody reads them.

    Raises:
        EvictionConfigError: a setting is wrong, or the platform is not supported.

    """
    arguments = eviction_engine_args(block_size=block_size, **settings)
    arguments["logits_processors"] += list(logits_processors)
    return [*serve_flags(arguments), "--middleware", MIDDLEWARE]
