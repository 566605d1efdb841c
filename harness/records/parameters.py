"""What a run's policy parameters are, complete, as its engine resolves them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_plugins.config import EvictionConfig
from vllm_plugins.parsing import resolve_args
from vllm_plugins.policies import get_policy
from vllm_plugins.request_settings import DEFAULT_GRANULARITY

from .specifications import STOCK


def policy_parameters(
    policy: str,
    args: Mapping[str, Any],
    granularity: str | None,
    eviction: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Of a run, so that its record holds them when a default is another one.

    Args:
        policy: of the run; ``stock`` and ``dense`` have none.
        args: what the study gives it.
        granularity: its own; None: the engine's.
        eviction: settings of its engine or server; None without the plug-in.

    """
    if policy == STOCK or eviction is None:
        return {}
    given = {**eviction.get("policy_args", {}).get(policy, {}), **args}
    own = granularity or eviction.get("granularity", DEFAULT_GRANULARITY)
    at = EvictionConfig().granularity_of(policy, given, own)
    return get_policy(policy).meant(resolve_args(policy, given), at)
