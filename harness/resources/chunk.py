"""The chunk in which a server computes prompts, where contexts have to fit by their budget. Pure.

A request holds its budget, the slack, and what is in flight: with asynchronous scheduling two
chunks. vLLM's default chunk of thousands of tokens may be several times the budget, and then it
decides which contexts fit.
"""

from __future__ import annotations

from vllm_plugins.config import EvictionConfig

LEAST = 512
"""Tokens. Below some hundred a step reads the weights for too few tokens: prompts are slow."""
_AMPLE = 16
"""In a pool of so many peaks the chunks in flight, which all requests share, hardly count."""
_SMALLEST = 64
"""No chunk is smaller, even if a context fits into a pool by it alone."""


def choose_chunk(
    config: EvictionConfig,
    max_model_len: int,
    block_size: int,
    *,
    num_steps_in_flight: int,
    default: int,
    least: int = LEAST,
    floor: int = 1,
    pool_blocks: int | None = None,
) -> int:
    """Tokens, a power of two where vLLM's default is one.

    The chunks in flight take no more than the budget of the longest request, so that its peak is at
    most two budgets and a slack; but no chunk is below ``least``. A pool that is known may be so
    large that vLLM's default stays; or so small that the longest request does not fit, and smaller
    chunks are tried: slow prompts are better than no server.

    Args:
        config: of the server, which holds requests to their budget.
        max_model_len: tokens of the longest request.
        block_size: tokens per block.
        num_steps_in_flight: 2 with asynchronous scheduling, else 1.
        default: vLLM's own chunk; none is longer.
        least: what speed asks for. A step has a token for each decode too, so it is also no less
            than the requests that may decode.
        floor: what vLLM asks for: its ``max_num_seqs``, if the user chose one.
        pool_blocks: of the pool; None: not known before the start.

    """

    def peak(chunk: int) -> int:
        return peak_blocks(config, max_model_len, block_size, num_steps_in_flight * chunk)

    if pool_blocks is not None and _AMPLE * peak(default) <= pool_blocks:
        return default
    budget = budget_tokens(config, max_model_len, block_size)
    chunk = min(default, max(_power_of_two(budget // num_steps_in_flight), least))
    while (
        pool_blocks is not None
        and chunk // 2 >= max(_SMALLEST, floor)
        and peak(chunk) > pool_blocks
    ):
        chunk //= 2
    return chunk


def budget_tokens(config: EvictionConfig, max_model_len: int, block_size: int) -> int:
    """What the longest request may keep, in tokens of whole blocks."""
    settings = config.request_settings(None, block_size)
    return settings.keep(max_model_len, block_size, config.min_blocks) * block_size


def peak_blocks(
    config: EvictionConfig, max_model_len: int, block_size: int, in_flight_tokens: int
) -> int:
    """Blocks that the longest request holds at most."""
    settings = config.request_settings(None, block_size)
    most = config.most_blocks(settings, max_model_len, block_size, in_flight_tokens)
    return min(most, -(-max_model_len // block_size))


def _power_of_two(number: int) -> int:
    """The largest that is no more than ``number``; 1 for none."""
    return 1 << max(0, number.bit_length() - 1)
