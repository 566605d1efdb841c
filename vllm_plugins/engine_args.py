"""From eviction settings to the keywords of ``vllm.LLM`` or ``vllm.EngineArgs``."""

from __future__ import annotations

from typing import Any

from .config import EvictionConfig
from .registration import CONNECTOR


def eviction_engine_args(*, block_size: int = 32, **settings: Any) -> dict[str, Any]:
    """Keywords that configure an engine for eviction.

        llm = LLM(model, **eviction_engine_args(policy="cab", sparsity=0.9))

    Args:
        block_size: tokens per KV block, the unit of eviction (CPU: a multiple of 32;
            CUDA: 16, 32, 64 or 128).
        **settings: fields of ``EvictionConfig``.

    Returns:
        ``kv_transfer_config``, ``worker_cls``, ``logits_processors`` (a validator that refuses
        bad per-request settings and touches no logits), ``block_size``, and
        ``enable_prefix_caching=False``: blocks computed after an eviction depend on what was
        evicted, so they must not be shared by the hash of their tokens.

    Raises:
        EvictionConfigError: a setting is wrong, or the platform is not supported yet.

    """
    from .attention import platform

    config = EvictionConfig.parse(settings)
    config.check_budget(block_size)
    here = platform()
    return {
        "kv_transfer_config": {
            "kv_connector": CONNECTOR,
            "kv_role": "kv_both",
            "kv_connector_extra_config": config.to_dict(),
        },
        "worker_cls": here.worker,
        "logits_processors": [here.validator],
        "block_size": block_size,
        "enable_prefix_caching": False,
        **here.engine_args,
    }
