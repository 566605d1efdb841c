"""A KV pool that a CPU server starts with, where the user names none.

vLLM takes 92% of a NUMA node's memory and refuses to start where that much is not free, which is
the usual case on a machine that does anything else.
"""

from __future__ import annotations

import os
from pathlib import Path

from .passthrough import Passthrough

_SHARE = 0.5
_WEIGHTS = ("*.safetensors", "*.bin")
_ENVIRONMENT = "VLLM_CPU_KVCACHE_SPACE"
_NAMED_BY = ("--kv-cache-memory-bytes", "--gpu-memory-utilization", "--device-memory-utilization")


def names_memory(flags: Passthrough) -> bool:
    """Whether the user chose a pool, by a flag or by vLLM's environment variable."""
    return any(name in flags for name in _NAMED_BY) or bool(os.environ.get(_ENVIRONMENT))


def cpu_pool_bytes(model: str, float32: bool) -> int:
    """Half of the memory that the model will leave free on the NUMA node vLLM would use.

    Args:
        model: its folder; of a hub id the weights' size is not known and taken as nothing.
        float32: whether weights, stored in two bytes a number, will take four.

    """
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info

    free = get_memory_node_info(get_allowed_cpu_list()[0].numa_node).available_memory
    files = (file for pattern in _WEIGHTS for file in Path(model).glob(pattern))
    weights = sum(file.stat().st_size for file in files) * (2 if float32 else 1)
    return max(0, int((free - weights) * _SHARE))
