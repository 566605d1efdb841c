"""KeyDiff: keys unlike the mean key (Park et al., 2025, arXiv:2504.15364); no attention needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Policy, check_selection
from .random import check_recent
from .token_rules import TokenRule, by_key_difference


def _check(parameters: Mapping[str, Any]) -> None:
    check_recent("keydiff", parameters["recent"])
    check_selection("keydiff", parameters["selection"])


POLICY = Policy(
    name="keydiff",
    tokens=lambda p: TokenRule(
        recent=p["recent"], ranked=((by_key_difference, 1.0),), selection=p["selection"]
    ),
    token_parameters={"recent": 0.0, "selection": "head"},
    check=_check,
)
