"""Scheduler side: the KV-cache manager of one layer group, which frees evicted blocks."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from .ledger import Ledger


class EvictableManager(FullAttentionManager):
    """``FullAttentionManager`` plus eviction at the place where vLLM frees skipped blocks.

    Without a ledger (``attach``), it is ``FullAttentionManager``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ledger: Ledger | None = None
        self._leaving: list[KVCacheBlock] = []

    def attach(self, ledger: Ledger) -> None:
        """From now on ``ledger`` decides who is evicted."""
        self._ledger = ledger

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Free the victims of ``request_id``; their entries become the null block.

        vLLM calls this from ``allocate_slots`` with the tokens no step in flight can still
        read, before it allocates: a freed block may be handed out in this same step, and the
        worker learns of both in order. (``_remove_blocks_in_range`` is of no use here: it
        stops at the first null.)
        """
        if self._ledger is None or request_id not in self.req_to_blocks:
            return
        blocks = self.req_to_blocks[request_id]
        victims = self._ledger.decide(
            request_id, self.kv_cache_group_id, processed_computed_tokens, blocks
        )
        if not victims:
            return
        freed = [blocks[i] for i in victims]
        for i in victims:
            blocks[i] = self._null_block
        self.block_pool.free_blocks(reversed(freed))

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """None: cascade attention reads a prefix through the first request's block table, and
        evicted blocks differ from request to request."""
        return 0

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """All blocks of ``request_id``, which ended or is preempted; ``free`` comes here too."""
        blocks = super().pop_blocks_for_free(request_id)
        if self._ledger is not None:
            self._ledger.release(request_id)
            if self._ledger.config.check_integrity:
                self._leaving += blocks
        return blocks

    def check_integrity(self) -> set[int]:
        """Ids of the blocks this group's requests hold.

        Raises:
            AssertionError: a block is held twice or not referenced exactly once.

        """
        held: set[int] = set()
        for request_id, blocks in self.req_to_blocks.items():
            for block in blocks:
                if block is self._null_block:
                    continue
                assert block.block_id not in held, f"{request_id}: block {block.block_id} twice"
                assert block.ref_cnt == 1, f"{request_id}: block {block.block_id} {block.ref_cnt}"
                held.add(block.block_id)
        return held

    def leaving(self, held: set[int]) -> set[int]:
        """Ids of blocks on their way back to the pool, given those that any group holds.

        With a connector and steps in flight, the scheduler returns an ended request's blocks only
        when the last of these steps is done (``deferred_frees`` in ``vllm/v1/core/sched``).
        """
        self._leaving = [
            block
            for block in self._leaving
            if block.ref_cnt and not block.is_null and block.block_id not in held
        ]
        return {block.block_id for block in self._leaving}
