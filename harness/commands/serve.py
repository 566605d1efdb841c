"""``kv-eviction serve``: ``vllm serve`` with the plugin configured."""

from __future__ import annotations

import argparse
import os
from typing import Any

from vllm_plugins.config import EvictionConfig
from vllm_plugins.policies import policy_names

from ..errors import UsageError
from ..models import DEFAULT_MODEL, resolve_model
from .eviction_flags import add_eviction_flags, eviction_settings


def add_parser(commands: Any) -> None:
    """Add the subcommand; what it does not know is handed on to ``vllm serve``."""
    parser = commands.add_parser(
        "serve",
        help="vllm serve with eviction configured; takes any flag of vllm serve",
        description="vllm serve with eviction configured. MODEL comes first; every flag that is "
        "not named here goes to vllm serve as it is.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help=f"folder, hub id, or {DEFAULT_MODEL}")
    parser.add_argument("--policy", default="h2o", help=f"of: {', '.join(policy_names())} [h2o]")
    parser.add_argument("--sparsity", default=None, metavar="S",
        help="share of KV blocks evicted, 0 <= S < 1 [0: stock vLLM]")  # fmt: skip
    parser.add_argument("--budget-tokens", type=int, default=None, metavar="TOKENS",
        help="absolute budget instead of --sparsity")  # fmt: skip
    parser.add_argument("--block-size", type=int, default=32, metavar="TOKENS",
        help="tokens per KV block, the unit of eviction [32]")  # fmt: skip
    parser.add_argument("--request-policies", nargs="*", default=None, metavar="POLICY",
        help="policies requests may ask for [any]")  # fmt: skip
    parser.add_argument("--print-command", action="store_true",
        help="print the plain vllm serve command and stop")  # fmt: skip
    add_eviction_flags(parser, EvictionConfig())
    parser.set_defaults(run=run)
    parse = parser.parse_known_args

    def hand_on(arguments: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list]:
        known, rest = parse(arguments, namespace)
        known.vllm_flags = rest
        return known, []

    parser.parse_known_args = hand_on  # type: ignore[method-assign]


def run(arguments: argparse.Namespace) -> int:
    """Print the equivalent command, and become it."""
    from vllm_plugins.checks import check_block_size

    from ..serving.flags import flag_value, shell_line
    from ..serving.launch import eviction_flags
    from ..serving.server import check_port, vllm_command

    check_block_size(arguments.block_size)
    settings = eviction_settings(arguments) | {"policy": arguments.policy}
    for name in ("sparsity", "budget_tokens", "request_policies"):
        if getattr(arguments, name) is not None:
            settings[name] = getattr(arguments, name)
    flags = [*eviction_flags(arguments.block_size, settings), *arguments.vllm_flags]
    model = resolve_model(arguments.model)
    if arguments.model == DEFAULT_MODEL and flag_value(flags, "--served-model-name") is None:
        flags += ["--served-model-name", DEFAULT_MODEL]
    print(shell_line(["vllm", "serve", model, *flags]), flush=True)
    if arguments.print_command:
        return 0
    port = flag_value(flags, "--port") or "8000"
    if not port.isdigit():
        raise UsageError(f"--port is {port!r}; give a number")
    check_port(flag_value(flags, "--host") or "0.0.0.0", int(port))
    command = vllm_command(model, flags)
    # The same process from here on: signals, exit status and output are vLLM's own.
    os.execv(command[0], command)
    raise AssertionError("not reached")
