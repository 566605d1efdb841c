"""What an engine says of itself once its pool is there: how it steps, and what fits. No vLLM."""

from __future__ import annotations

from typing import Any

from .capacity import Capacity
from .config import EvictionConfig


def engine_lines(
    vllm_config: Any,
    config: EvictionConfig,
    num_blocks: int,
    num_groups: int,
    num_windowed: int = 0,
) -> list[str]:
    """A sentence a line.

    Args:
        vllm_config: ``vllm.config.VllmConfig`` of the engine, as it runs.
        config: settings of the server.
        num_blocks: that requests may hold.
        num_groups: layer groups, which share them.
        num_windowed: KV-cache groups of windowed layers, which share them too. How much they take
            depends on who runs.

    """
    if num_windowed:
        return [
            *_step_lines(vllm_config),
            f"the pool has {num_blocks:,} blocks, for {num_groups} KV-cache groups that evict and "
            f"{num_windowed} of sliding-window layers; what fits is in vLLM's own lines",
        ]
    capacity = Capacity(
        config=config,
        max_model_len=vllm_config.model_config.max_model_len,
        block_size=vllm_config.cache_config.block_size,
        num_blocks=num_blocks // num_groups,
        in_flight_tokens=vllm_config.max_in_flight_tokens,
        num_steps_in_flight=vllm_config.max_concurrent_batches,
    )
    return [*_step_lines(vllm_config), *capacity_lines(capacity, num_groups)]


def _step_lines(vllm_config: Any) -> list[str]:
    scheduler, mode = vllm_config.scheduler_config, vllm_config.compilation_config.cudagraph_mode
    steps = (
        "async scheduling is on, so two steps are in flight and a decision sees scores that are "
        "one step old"
        if scheduler.async_scheduling
        else "async scheduling is off, so one step is in flight"
    )
    on_cuda = vllm_config.device_config.device_type == "cuda"
    graphs = f"CUDA graphs {mode.name}" if on_cuda and mode and mode.value else "no CUDA graphs"
    return [
        f"a step computes at most {scheduler.max_num_batched_tokens:,} tokens "
        f"(max_num_batched_tokens, the chunk) of {scheduler.max_num_seqs:,} requests "
        f"(max_num_seqs); blocks have {vllm_config.cache_config.block_size} tokens",
        f"{steps}; {graphs}",
    ]


def capacity_lines(capacity: Capacity, num_groups: int) -> list[str]:
    """What the pool holds, by the server's own budget and without one.

    Args:
        capacity: of the engine.
        num_groups: layer groups, which share the pool.

    """
    each = f" for each of {num_groups} layer groups" if num_groups > 1 else ""
    length = f"{capacity.max_model_len:,} tokens (max_model_len)"
    lines = [
        f"the pool holds {capacity.pool_tokens:,} tokens, {capacity.num_blocks:,} blocks{each}"
    ]
    if capacity.evicts:
        kept = capacity.budget_blocks
        lines += [
            f"a request of {length} keeps {kept * capacity.block_size:,} tokens, {kept:,} blocks; "
            f"while its prompt is computed it holds up to {capacity.peak_blocks:,} blocks: budget, "
            "slack and chunk",
            f"requests of that length that fit at once: {capacity.num_evicting:,} by the budget, "
            f"whichever policy evicts; {capacity.num_dense:,} under dense",
        ]
    else:
        lines.append(
            f"requests of {length} that fit at once: {capacity.num_dense:,}; the server evicts "
            "nothing by itself, and a request's own budget makes room"
        )
    return [*lines, _longest(capacity)]


def _longest(capacity: Capacity) -> str:
    admitted = f"contexts of up to {capacity.max_model_len:,} tokens are admitted"
    longest = capacity.longest_context
    if longest is None:
        return f"{admitted}; the budget is absolute, so max_model_len may be of any length"
    if capacity.config.request_budgets == "server":
        return f"{admitted}; by the budget this pool holds one of {longest:,}"
    more = (
        ", and more with request_budgets server (--request-budgets server)"
        if capacity.evicts
        else ""
    )
    return f"{admitted}; the pool has to hold one whole, so max_model_len ends at {longest:,}{more}"
