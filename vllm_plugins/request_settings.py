"""What one request follows. Neither vLLM nor torch is imported here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .policies import ATTENTION, GRAPH, TOKEN_MASS, TOKEN_PEAK, TokenRule, get_policy

BLOCK, TOKEN = GRANULARITIES = ("block", "token")
_ATTENTION = frozenset({ATTENTION, GRAPH, TOKEN_MASS, TOKEN_PEAK})
"""Needs that are sums of attention."""
DEFAULT_GRANULARITY = "default"
"""Tokens where the policy can choose them, else blocks."""


@dataclass(frozen=True)
class RequestSettings:
    """What one request follows: a policy with its parameters, and a budget.

    ``budget_tokens`` (absolute) replaces ``sparsity`` (relative) where it is given. ``one_step``:
    the prompt fits into a step and the answer is a token, so that no step is left to evict for.
    """

    policy: str
    sparsity: float
    budget_tokens: int | None
    policy_args: Mapping[str, Any]
    granularity: str
    one_step: bool = False

    @cached_property
    def evicts(self) -> bool:
        """False: no block of the request is ever evicted, and no score is gathered for it."""
        budget = self.sparsity > 0 or self.budget_tokens is not None
        return get_policy(self.policy).evicts and budget and not self.one_step

    @cached_property
    def rule(self) -> TokenRule | None:
        """How the budget is spent at token granularity; None at block granularity."""
        policy = get_policy(self.policy)
        if self.granularity != TOKEN or policy.tokens is None:
            return None
        return policy.tokens(self.policy_args)

    @cached_property
    def needs(self) -> frozenset[str]:
        """The inputs gathered for this request; none where it never evicts."""
        if not self.evicts:
            return frozenset()
        return get_policy(self.policy).needed(self.policy_args, self.granularity)

    @cached_property
    def gathers_attention(self) -> bool:
        """Whether attention is summed up with the request's blocks, so that none is shared."""
        return bool(self.needs & _ATTENTION)

    @cached_property
    def window(self) -> int | None:
        """Of the last so many queries' attention the request's tokens are ranked by."""
        return self.rule.window if self.rule is not None and self.evicts else None

    def keep(self, num_tokens: int, block_size: int, min_blocks: int) -> int:
        """How many full blocks a sequence of ``num_tokens`` may hold."""
        if self.budget_tokens is not None:
            return self.budget_tokens // block_size
        # The slack keeps 0.7 * 10 blocks at 3 where (1 - 0.7) * 10 is 3.0000000000000004.
        blocks = math.ceil((1.0 - self.sparsity) * num_tokens / block_size - 1e-9)
        return max(min_blocks, blocks)

    def effective_sparsity(self, num_tokens: int, block_size: int, min_blocks: int) -> float:
        """Share of a sequence of ``num_tokens`` that its budget really lets go.

        Less than ``sparsity`` where ``min_blocks`` or whole blocks leave more, 0 where the
        sequence fits into its budget.
        """
        if num_tokens < 1:
            return 0.0
        kept = self.keep(num_tokens, block_size, min_blocks) * block_size
        return max(0.0, 1.0 - kept / num_tokens)
