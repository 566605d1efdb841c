"""Bytes of the KV cache, of an engine's configuration."""

from __future__ import annotations

from typing import Any

from vllm_plugins.refusals.engine import num_evicting_layers

from ..study.specification import EngineSpecification


def bytes_per_block(config: Any, specification: EngineSpecification) -> int:
    """Bytes of one physical block: keys and values of the layers of one layer group."""
    model, parallel = config.model_config, config.parallel_config
    layers = num_evicting_layers(
        model.hf_text_config, model.get_num_layers(parallel), model.max_model_len
    )
    layers //= specification.eviction["layer_groups"]
    width = 2 * model.get_num_kv_heads(parallel) * model.get_head_size()
    return layers * width * specification.block_size * kv_itemsize(config)


def kv_itemsize(config: Any) -> int:
    """Bytes of a number of a key or a value in the cache."""
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    dtype = config.cache_config.cache_dtype
    return kv_cache_dtype_str_to_dtype(dtype, config.model_config).itemsize
