"""What fits into an engine's pool, by budgets and without. No vLLM, no torch."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from .config import EvictionConfig

_ANY_LENGTH = 2**31 - 1
"""Tokens; no model reads so many."""


@dataclass(frozen=True)
class Capacity:
    """A pool, and the longest request that it has to hold.

    Args:
        config: settings of the server; what fits is told of requests that follow them.
        max_model_len: tokens.
        block_size: tokens per block.
        num_blocks: that requests may hold, by layer group.
        in_flight_tokens: that may be scheduled and not processed yet, over all requests.
        num_steps_in_flight: 2 with asynchronous scheduling, else 1.

    """

    config: EvictionConfig
    max_model_len: int
    block_size: int
    num_blocks: int
    in_flight_tokens: int
    num_steps_in_flight: int

    @property
    def pool_tokens(self) -> int:
        """Tokens that the pool holds."""
        return self.num_blocks * self.block_size

    @property
    def evicts(self) -> bool:
        """Whether a request that asks for nothing loses anything."""
        return self.config.request_settings(None, self.block_size).evicts

    @property
    def dense_blocks(self) -> int:
        """Of the longest request, if nothing is evicted."""
        return -(-self.max_model_len // self.block_size)

    @property
    def budget_blocks(self) -> int:
        """Full blocks that the longest request may keep."""
        settings = self.config.request_settings(None, self.block_size)
        keep = settings.keep(self.max_model_len, self.block_size, self.config.min_blocks)
        return min(keep, self.dense_blocks)

    @property
    def peak_blocks(self) -> int:
        """Most blocks that the longest request holds, while its prompt is computed alone."""
        return min(self.dense_blocks, self._most(self.max_model_len, self.in_flight_tokens))

    @property
    def num_dense(self) -> int:
        """How many of the longest requests fit at once, if nothing is evicted."""
        return self.num_blocks // self.dense_blocks

    @property
    def num_evicting(self) -> int:
        """The same under the budget: all of them decode, but for the prompts in flight."""
        decoding = min(self.dense_blocks, self._most(self.max_model_len, self.num_steps_in_flight))
        in_flight = -(-self.in_flight_tokens // self.block_size)
        return max(0, self.num_blocks - in_flight) // decoding

    @property
    def longest_context(self) -> int | None:
        """Tokens of the longest context with which an engine of this pool starts.

        By its length, unless no request may keep more than the budget; None: the budget does not
        grow with the length, so that any context fits.
        """
        if self.config.request_budgets != "server":
            return self.pool_tokens
        if self._most(_ANY_LENGTH, self.in_flight_tokens) <= self.num_blocks:
            return None
        lengths = range(_ANY_LENGTH)
        by_budget = bisect_right(
            lengths, self.num_blocks, key=lambda n: self._most(n, self.in_flight_tokens)
        )
        return max(self.pool_tokens, by_budget - 1)

    def _most(self, num_tokens: int, in_flight_tokens: int) -> int:
        settings = self.config.request_settings(None, self.block_size)
        return self.config.most_blocks(settings, num_tokens, self.block_size, in_flight_tokens)
