"""From eviction settings to the keywords of ``vllm.LLM`` or ``vllm.EngineArgs``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import EvictionConfig
from .parsing import EvictionConfigError, parse_int
from .platforms import platform
from .policies import get_policy
from .refusals.server_settings import encode
from .registration import CONNECTOR


def eviction_engine_args(
    *, block_size: int = 32, prefix_caching: bool = True, **settings: Any
) -> dict[str, Any]:
    """Keywords that configure an engine for eviction.

        llm = LLM(model, **eviction_engine_args(policy="cab", sparsity=0.9))

    Args:
        block_size: tokens per KV block, the unit of eviction (CPU: a multiple of 32;
            CUDA: 16, 32, 64 or 128).
        prefix_caching: whether requests share what they have in common, up to their first eviction.
        **settings: fields of ``EvictionConfig``.

    Returns:
        ``kv_transfer_config``, ``worker_cls``, ``logits_processors`` (a validator that refuses
        bad per-request settings and touches no logits), ``block_size``, and
        ``enable_prefix_caching``.

    Raises:
        EvictionConfigError: a setting is wrong, a policy that evicts has no budget (``sparsity=0``
            says that requests bring their own), or the platform is not supported yet.

    """
    config = EvictionConfig.parse(settings)
    block_size = parse_int("block_size", block_size, 1)
    config.check_budget(block_size)
    check_has_budget(settings)
    current = platform()
    return {
        "kv_transfer_config": {
            "kv_connector": CONNECTOR,
            "kv_role": "kv_both",
            "kv_connector_extra_config": config.to_dict(),
        },
        "worker_cls": current.worker,
        "logits_processors": [f"{current.validator}.{encode(config, block_size)}"],
        "block_size": block_size,
        "enable_prefix_caching": prefix_caching,
        **current.engine_args,
    }


def check_has_budget(settings: Mapping[str, Any]) -> None:
    """Refuse a policy that was chosen to evict and never would.

    Raises:
        EvictionConfigError: ``policy`` evicts, and no budget is named.

    """
    policy = settings.get("policy")
    if policy is None or not get_policy(policy).evicts:
        return
    if "sparsity" not in settings and settings.get("budget_tokens") is None:
        raise EvictionConfigError(
            f"policy {policy} evicts nothing without a budget; give sparsity (--sparsity) or "
            "budget_tokens (--budget-tokens), or sparsity 0 if requests bring their own"
        )
