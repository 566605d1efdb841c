"""Eviction policies: pure functions over NumPy arrays, without vLLM and torch."""

from .base import ATTENTION, GRAPH, KEY_NORM, NEEDS, RNG, Policy, PolicyParameterError, check_kept
from .registry import ENTRY_POINT_GROUP, get_policy, policy_names
from .select import keep_highest

__all__ = [
    "ATTENTION",
    "ENTRY_POINT_GROUP",
    "GRAPH",
    "KEY_NORM",
    "NEEDS",
    "RNG",
    "Policy",
    "PolicyParameterError",
    "check_kept",
    "get_policy",
    "keep_highest",
    "policy_names",
]
