"""TOVA: what the newest query attends to (Oren et al., EMNLP 2024, arXiv:2401.06104)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Policy, check_own_sets
from .token_rules import TokenRule, by_mass


def tova_tokens(parameters: Mapping[str, Any]) -> TokenRule:
    """The heads of a layer keep one set: the tokens that the last query attends to most, summed
    over these heads.

    Departures, shared by all policies here: sinks stay, and so does the newest whole block. In a
    prompt the last query is that of a chunk.
    """
    return TokenRule(
        recent=parameters["recent"],
        ranked=((by_mass, 1.0),),
        selection=parameters["selection"],
        window=1,
    )


POLICY = Policy(
    name="tova",
    tokens=tova_tokens,
    token_parameters={"recent": 0.0, "selection": "layer"},
    check=lambda p: check_own_sets("tova", p),
)
