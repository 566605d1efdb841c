"""``kv-eviction serve``: ``vllm serve`` with the plugin configured."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from vllm_plugins.config import EvictionConfig
from vllm_plugins.engine_args import check_has_budget
from vllm_plugins.parsing import parse_int
from vllm_plugins.policies import policy_names

from ..errors import UsageError
from ..inputs.models import DEFAULT_MODEL, resolve_model
from ..resources.passthrough import Passthrough, dashed
from .eviction_flags import add_eviction_flags, eviction_settings
from .serve_notes import settings_notes


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
    parser.add_argument("--policy", default=None, help=f"of: {', '.join(policy_names())} [h2o]")
    parser.add_argument(
        "--sparsity",
        default=None,
        metavar="S",
        help="share of KV blocks evicted, 0 <= S < 1; 0 if requests bring their own",
    )
    parser.add_argument(
        "--budget-tokens",
        type=int,
        default=None,
        metavar="TOKENS",
        help="absolute budget instead of --sparsity",
    )
    parser.add_argument(
        "--block-size",
        type=int,
        default=None,
        metavar="TOKENS",
        help=f"tokens per KV block, the unit of eviction [{_BLOCK_SIZE}]",
    )
    parser.add_argument(
        "--request-policies",
        nargs="*",
        default=None,
        metavar="POLICY",
        help="policies requests may ask for [any]",
    )
    parser.add_argument(
        "--request-granularity",
        choices=("any", "server"),
        default=None,
        help="server: no request may choose its granularity, which saves memory [any]",
    )
    parser.add_argument(
        "--request-budgets",
        choices=("any", "server"),
        default=None,
        help="server: no request may keep more than the server's own budget, so a context may be "
        "longer than what the pool holds [any]",
    )
    parser.add_argument(
        "--score-chunk",
        type=int,
        default=None,
        metavar="TOKENS",
        help="compute prompts in chunks of so many tokens, one request at a time, so that prompt "
        "log-probs (prompt_logprobs, echo) measure eviction",
    )
    parser.add_argument(
        "--print-command", action="store_true", help="print the plain vllm serve command and stop"
    )
    add_eviction_flags(parser, EvictionConfig())
    parser.set_defaults(run=run)
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    own_flags = [flag for action in shown for flag in action.option_strings]
    parse = parser.parse_known_args

    def hand_on(words: Sequence[str], namespace: Any = None) -> tuple[argparse.Namespace, list]:
        known, rest = parse([dashed(word, own_flags) for word in words], namespace)
        known.vllm_flags, known.own_flags = rest, own_flags
        return known, []

    parser.parse_known_args = hand_on


def run(arguments: argparse.Namespace) -> int:
    """Print the equivalent command, and become it.

    What needs only the command line and the model's configuration is checked first: vLLM alone
    takes seconds to import.
    """
    from ..resources.model_facts import check_config, read_config
    from ..resources.serve_flags import shell_line
    from ..resources.server import check_port, parse_port, vllm_command

    environment = dict(os.environ)  # looking at the platform quietens vLLM, here and not there
    settings = _settings(arguments)
    config = EvictionConfig.parse(settings)
    flags = Passthrough(arguments.vllm_flags)
    flags.check(config, arguments.own_flags)
    if arguments.block_size is None:
        arguments.block_size = _block_size(flags)
    check_has_budget(settings)
    config.check_budget(arguments.block_size)
    given = flags.get("--port")
    port = parse_port("8000" if given is None else given)
    if arguments.score_chunk is not None:
        flags.flags += _score_flags(arguments.score_chunk, flags)
    model = resolve_model(arguments.model)
    facts = read_config(model, fetch=not arguments.print_command)
    if facts and "--hf-overrides" not in flags:
        check_config(model, facts, config.layer_groups, _whole(flags.get("--max-model-len")))
    vllm_flags, notes = _vllm_flags(arguments, settings, flags, model, facts)
    print(shell_line(["vllm", "serve", model, *vllm_flags]), flush=True)
    for note in (config.summary(_SHARES_PREFIXES in vllm_flags), *notes, _WHAT_FITS):
        print(f"kv-eviction: {note}", file=sys.stderr, flush=True)
    if arguments.print_command:
        return 0
    if "--uds" not in flags:
        check_port(flags.get("--host") or "0.0.0.0", port)
    command = vllm_command(model, vllm_flags)
    # The same process from here on: signals, exit status and output are vLLM's own.
    os.execve(command[0], command, environment)
    raise AssertionError("not reached")


_WHAT_FITS = (
    "what fits is known once the engine has its pool: see the lines of its log that begin with "
    "'KV eviction:'"
)
_BLOCK_SIZE = 32
_SHARES_PREFIXES = "--enable-prefix-caching"
_OWN = (
    *("policy", "sparsity", "budget_tokens"),
    *("request_policies", "request_granularity", "request_budgets"),
)
"""Settings that only a server has a flag for."""


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = eviction_settings(arguments)
    for name in _OWN:
        if getattr(arguments, name) is not None:
            settings[name] = getattr(arguments, name)
    return settings


def _vllm_flags(
    arguments: argparse.Namespace,
    settings: dict[str, Any],
    flags: Passthrough,
    model: str,
    facts: dict[str, Any] | None,
) -> tuple[list[str], list[str]]:
    """All flags of ``vllm serve``, and what to tell the user of those chosen here."""
    from vllm_plugins.refusals.engine import check_block_size, check_kv_cache_dtype

    from ..resources.chunk_flags import chunk_flags, max_model_len, pool_bytes
    from ..resources.cpu_pool import cpu_pool_bytes, names_memory
    from ..resources.launch import device_type
    from ..resources.serve_flags import eviction_flags

    check_block_size(arguments.block_size)
    check_kv_cache_dtype(flags.get("--kv-cache-dtype") or "auto")
    # vLLM reads the file of --config before these, so they repeat what it says.
    engine = {**settings, "prefix_caching": flags.take_switch(_SHARES_PREFIXES) is not False}
    processors = flags.take("--logits-processors")
    made = [*eviction_flags(arguments.block_size, engine, processors), *flags.flags]
    config = EvictionConfig.parse(settings)
    length = max_model_len(flags, facts)
    notes = settings_notes(config, settings, arguments.block_size, length)
    if arguments.model == DEFAULT_MODEL and "--served-model-name" not in flags:
        made += ["--served-model-name", DEFAULT_MODEL]
    size = pool_bytes(flags)
    if device_type() == "cpu" and not names_memory(flags):
        size = cpu_pool_bytes(model, float32=flags.get("--dtype") in ("float32", "float"))
        made += ["--kv-cache-memory-bytes", str(size)]
        notes.append(
            f"the KV pool takes {size / 2**30:.1f} GiB, half of what is free on this NUMA node; "
            "choose another size with --kv-cache-memory-bytes"
        )
    if arguments.score_chunk is None:
        chunk, told = chunk_flags(config, flags, facts, arguments.block_size, size)
        made, notes = [*made, *chunk], [*notes, *told]
        notes.append(
            "prompt log-probs (prompt_logprobs, echo) see evictions between chunks only, and a "
            "chunk may be a whole prompt: they measure the dense model then; to measure what is "
            "served, start with --score-chunk 64"
        )
    else:
        notes.append(
            f"--score-chunk {arguments.score_chunk}: one request at a time, in steps of "
            f"{arguments.score_chunk} tokens; for scoring, not for speed"
        )
    return made, notes


def _block_size(flags: Passthrough) -> int:
    """What the file of ``--config`` says, or the default."""
    text = flags.get("--block-size")
    return _BLOCK_SIZE if text is None else parse_int("block-size in --config", text, 1)


def _score_flags(chunk: int, flags: Passthrough) -> list[str]:
    """Under these every prompt advances by exactly ``chunk`` tokens a step.

    A request that is alone in the engine gets its whole token budget, whatever
    ``long_prefill_token_threshold`` says (``vllm/v1/core/sched/scheduler.py``), so the budget is
    the chunk; a second request would share it, so there is none; and a step in flight would delay
    each eviction by a chunk.
    """
    if chunk < 1:
        raise UsageError(f"--score-chunk is {chunk}; give a number of tokens of at least 1")
    for name in (
        "--max-num-batched-tokens",
        "--max-num-seqs",
        "--long-prefill-token-threshold",
        "--async-scheduling",
    ):
        if name in flags:
            raise UsageError(f"--score-chunk sets {name} itself; drop one of the two")
    if flags.switch("--enable-chunked-prefill") is False:
        raise UsageError(
            "--score-chunk computes prompts in chunks, which --no-enable-chunked-prefill rules "
            "out; drop one of the two"
        )
    return ["--max-num-batched-tokens", str(chunk), "--max-num-seqs", "1", "--no-async-scheduling"]


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None
