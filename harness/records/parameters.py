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
    if policy == STOCK:
        return {}
    given, at = given_and_granularity(policy, args, granularity, eviction or {})
    return get_policy(policy).meant(resolve_args(policy, given), at)


def given_and_granularity(
    policy: str,
    args: Mapping[str, Any],
    granularity: str | None,
    eviction: Mapping[str, Any],
    otherwise: str = DEFAULT_GRANULARITY,
) -> tuple[dict[str, Any], str]:
    """A run's own parameters over its engine's, and ``block`` or ``token``. ``otherwise``: the
    engine's granularity where its settings do not say it.

    Raises:
        EvictionConfigError: a policy or parameter that is not there today.

    """
    given = {**eviction.get("policy_args", {}).get(policy, {}), **args}
    own = granularity or eviction.get("granularity", otherwise)
    return given, EvictionConfig().granularity_of(policy, given, own)
