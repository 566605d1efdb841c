"""KeyDiff: keys unlike the mean key (Park et al., 2025, arXiv:2504.15364); no attention needed."""

from __future__ import annotations

from .base import Policy, check_own_sets
from .token_rules import TokenRule, by_key_difference

POLICY = Policy(
    name="keydiff",
    tokens=lambda p: TokenRule(
        recent=p["recent"], ranked=((by_key_difference, 1.0),), selection=p["selection"]
    ),
    token_parameters={"recent": 0.0, "selection": "head"},
    check=lambda p: check_own_sets("keydiff", p),
)
