"""Which chunk ``kv-eviction serve`` asks vLLM for, and what it says of it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from vllm_plugins.config import EvictionConfig
from vllm_plugins.platforms import FP8

from .chunk import LEAST, budget_tokens, choose_chunk, peak_blocks
from .launch import device_type
from .passthrough import Passthrough
from .pool_size import pool_blocks

_CHUNK = "--max-num-batched-tokens"


def chunk_flags(
    config: EvictionConfig,
    flags: Passthrough,
    facts: Mapping[str, Any] | None,
    block_size: int,
    size: int | None,
) -> tuple[list[str], list[str]]:
    """Flags that name a chunk, and what to tell the user of it.

    Nothing where requests may keep all: vLLM plans memory by their length then, whatever the chunk.

    Args:
        config: of the server.
        flags: the user's.
        facts: ``model_facts.read_config``; None: not known.
        block_size: tokens per block.
        size: bytes of the KV pool; None: vLLM will find out.

    """
    if config.request_budgets != "server":
        return [], []
    length = max_model_len(flags, facts)
    if length is None:
        return [], [
            "the chunk is vLLM's own choice, as the model's longest context is not known here; "
            f"give --max-model-len, or {_CHUNK}"
        ]
    if "--no-enable-chunked-prefill" in flags:
        return [], [
            "--no-enable-chunked-prefill computes a prompt in one step, so its peak is its length; "
            "drop that flag if a context is to be longer than the pool"
        ]
    steps = 2 if device_type() == "cuda" and "--no-async-scheduling" not in flags else 1
    default, num_seqs = _vllm_defaults(flags)
    chosen_seqs = _number(flags.get("--max-num-seqs"))
    blocks = _pool_blocks(config, flags, facts, block_size, size)
    chunk = choose_chunk(
        config,
        length,
        block_size,
        num_steps_in_flight=steps,
        default=default,
        least=max(LEAST, chosen_seqs or num_seqs),
        floor=chosen_seqs or 1,
        pool_blocks=blocks,
    )
    budget = budget_tokens(config, length, block_size)

    def peak(tokens: int) -> str:
        held = peak_blocks(config, length, block_size, steps * tokens)
        return f"{held * block_size:,} tokens"

    whose = f"a request of {length:,} tokens, whose budget is {budget:,}"
    if (given := flags.get(_CHUNK)) is not None:
        tokens = _number(given)
        if tokens is None or tokens <= chunk:
            return [], []
        return [], [
            f"the chunk of {tokens:,} tokens is large: {whose}, holds up to {peak(tokens)} while "
            f"its prompt is computed; with {_CHUNK} {chunk} it holds {peak(chunk)}"
        ]
    told = f"{whose}, then holds up to {peak(chunk)} while its prompt is computed"
    room = f"; the pool holds about {blocks * block_size:,}" if blocks is not None else ""
    if chunk == default:
        return [], [f"the chunk is vLLM's default of {default:,} tokens: {told}{room}"]
    return [_CHUNK, str(chunk)], [
        f"the chunk is {chunk:,} tokens ({_CHUNK}), chosen by the budget: {told}; vLLM's default "
        f"of {default:,} would make that {peak(default)}{room}"
    ]


def pool_bytes(flags: Passthrough) -> int | None:
    """Of the KV pool, where the user named it."""
    return _number(flags.get("--kv-cache-memory-bytes"))


def max_model_len(flags: Passthrough, facts: Mapping[str, Any] | None) -> int | None:
    """Tokens of the longest context, by flag or as the model says; None: not known here."""
    given = _number(flags.get("--max-model-len"))
    if given is not None and given > 0:  # -1: as long as the model, or the pool
        return given
    longest = (facts or {}).get("max_position_embeddings")
    return longest if isinstance(longest, int) else None


def _vllm_defaults(flags: Passthrough) -> tuple[int, int]:
    """vLLM's own chunk and its own number of requests in a step, on this machine."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    tokens, seqs = EngineArgs.get_batch_defaults(_ranks(flags))
    server = UsageContext.OPENAI_API_SERVER
    return tokens[server], seqs[server]


def _pool_blocks(
    config: EvictionConfig,
    flags: Passthrough,
    facts: Mapping[str, Any] | None,
    block_size: int,
    size: int | None,
) -> int | None:
    if facts is None or size is None:
        return None
    return pool_blocks(
        size,
        facts,
        config,
        block_size,
        dtype_bytes=_kv_itemsize(flags, facts),
        ranks=_ranks(flags),
    )


def _kv_itemsize(flags: Passthrough, facts: Mapping[str, Any]) -> int:
    if flags.get("--kv-cache-dtype") in FP8:
        return 1
    stored = facts.get("dtype") or facts.get("torch_dtype")
    dtype = flags.get("--dtype")
    return 4 if (stored if dtype in (None, "auto") else dtype) in ("float32", "float") else 2


def _ranks(flags: Passthrough) -> int:
    return _number(flags.get("--tensor-parallel-size")) or 1


def _number(text: str | None) -> int | None:
    """As vLLM reads it (``8k``, ``auto``); None: not given, or for vLLM to refuse."""
    from vllm.utils.argparse_utils import human_readable_int_or_auto

    try:
        return None if text is None else human_readable_int_or_auto(text)
    except (ValueError, argparse.ArgumentTypeError):
        return None
