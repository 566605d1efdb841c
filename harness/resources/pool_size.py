"""How many blocks a pool of so many bytes holds, by a model's ``config.json`` alone. Pure.

An estimate, for what has to be chosen before vLLM is asked. It is low where it is not exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_plugins.attention.token_scores import bytes_per_token
from vllm_plugins.config import EvictionConfig
from vllm_plugins.policies import TOKEN_NEEDS


def pool_blocks(
    pool_bytes: int,
    facts: Mapping[str, Any],
    config: EvictionConfig,
    block_size: int,
    *,
    dtype_bytes: int,
    ranks: int,
) -> int | None:
    """Blocks of a layer group that requests may hold; None: the configuration does not say.

    Args:
        pool_bytes: for keys, values and the tokens' scores, of one rank.
        facts: ``model_facts.read_config``.
        config: of the server; its requests' needs take room beside keys and values.
        block_size: tokens per block.
        dtype_bytes: of a number of a key.
        ranks: tensor-parallel ranks, which share the KV heads.

    """
    num_heads, width = facts.get("num_attention_heads"), facts.get("hidden_size")
    num_layers = facts.get("num_hidden_layers")
    num_kv_heads = facts.get("num_key_value_heads") or num_heads
    head_size = facts.get("head_dim") or (width // num_heads if width and num_heads else None)
    if not (num_layers and num_kv_heads and head_size):
        return None
    if len(set(facts.get("layer_types") or ())) > 1:
        return None  # windowed layers hold as many blocks as their window
    scores = bytes_per_token(config.needs() & TOKEN_NEEDS)
    per_head = 2 * head_size * dtype_bytes + scores
    per_token = num_layers * max(1, num_kv_heads // ranks) * per_head
    # One block of the pool is the null block.
    return max(0, pool_bytes // (per_token * block_size) - 1)
