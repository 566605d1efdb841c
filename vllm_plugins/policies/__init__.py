"""Eviction policies: pure functions over NumPy arrays, without vLLM and torch."""

from .base import (
    ATTENTION,
    BLOCK_SCORES,
    CHANCE,
    GRAPH,
    KEY_NORM,
    NEEDS,
    Policy,
    PolicyParameterError,
    check_kept,
)
from .chance import chance
from .registry import ENTRY_POINT_GROUP, get_policy, policy_names
from .select import keep_highest
from .token_rules import (
    TOKEN_MASS,
    TOKEN_NEEDS,
    TOKEN_PEAK,
    TOKENS,
    Candidates,
    TokenRule,
    by_chance,
    by_key_difference,
    by_key_norm,
    by_mass,
    by_peak,
    by_position,
    by_score,
    by_valued_score,
)

__all__ = [
    "ATTENTION",
    "BLOCK_SCORES",
    "CHANCE",
    "ENTRY_POINT_GROUP",
    "GRAPH",
    "KEY_NORM",
    "NEEDS",
    "TOKENS",
    "TOKEN_MASS",
    "TOKEN_NEEDS",
    "TOKEN_PEAK",
    "Candidates",
    "Policy",
    "PolicyParameterError",
    "TokenRule",
    "by_chance",
    "by_key_difference",
    "by_key_norm",
    "by_mass",
    "by_peak",
    "by_position",
    "by_score",
    "by_valued_score",
    "chance",
    "check_kept",
    "get_policy",
    "keep_highest",
    "policy_names",
]
