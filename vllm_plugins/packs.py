"""What the scheduler tells the workers to pack. No vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Pack:
    """One request's candidates in one layer group, and how many blocks their best tokens fill.

    It names physical blocks, so it does not depend on the runner's tables, which learn of the
    freed blocks after it. The blocks that stay are the first ``num_kept_blocks`` of ``block_ids``.

    Attributes:
        group: layer group.
        block_ids: candidates, all full and processed: the packed region, and what leaves the
            recent window.
        num_kept_blocks: blocks of the region.
        budget_blocks: blocks the request may hold in all; shares of a rule are shares of it.
        num_tokens: of the request, whose queries the scores include, evicted ones among them.
        seed: of the request's fixed random numbers.
        policy, policy_args: whose rule ranks the tokens.
        first_query: what lies before it came from the prefix cache; its queries are not included.

    """

    group: int
    block_ids: list[int]
    num_kept_blocks: int
    budget_blocks: int
    num_tokens: int
    seed: int
    policy: str
    policy_args: Mapping[str, Any]
    first_query: int = 0
