"""SnapKV: what a prompt's end attends to (Li et al., NeurIPS 2024, arXiv:2404.14469)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Policy, PolicyParameterError, check_own_sets
from .token_rules import TOKEN_MASS, Candidates, TokenRule, by_mass

LONGEST_POOL = 101


def snapkv_tokens(parameters: Mapping[str, Any]) -> TokenRule:
    """Every head keeps what the last ``window`` queries of a chunk attend to, each token's mass
    being the mean over ``pool`` neighbours in the sequence.

    The paper compresses a prompt once and keeps every answered token. Here the budget holds for the
    answer too: its queries add to what the prompt's last ones gave.
    """
    width = parameters["pool"]

    def by_pooled_mass(tokens: Candidates, left: Any) -> Any:
        return tokens.pooled(tokens.mass, width)

    return TokenRule(
        recent=parameters["recent"],
        ranked=((by_mass if width == 1 else by_pooled_mass, 1.0),),
        needs=frozenset({TOKEN_MASS}),
        selection=parameters["selection"],
        window=parameters["window"],
    )


def _check(parameters: Mapping[str, Any]) -> None:
    check_own_sets("snapkv", parameters)
    if parameters["window"] < 1:
        raise PolicyParameterError(
            f"window of policy snapkv is {parameters['window']}; give at least 1 query"
        )
    if parameters["pool"] not in range(1, LONGEST_POOL + 1, 2):
        raise PolicyParameterError(
            f"pool of policy snapkv is {parameters['pool']}; give an odd number of tokens, "
            f"at most {LONGEST_POOL}"
        )


POLICY = Policy(
    name="snapkv",
    tokens=snapkv_tokens,
    token_parameters={"recent": 0.2, "window": 32, "pool": 5, "selection": "head"},
    check=_check,
)
