"""Who holds which blocks: what ``KVEvictionConnector.check_integrity`` asks every manager."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock

from .ledger import Ledger

if TYPE_CHECKING:
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager as _Manager
else:
    _Manager = object


class CountedManager(_Manager):
    """Over one of vLLM's KV-cache managers. Without a ledger it is that manager."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ledger: Ledger | None = None
        self._leaving: list[KVCacheBlock] = []

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """All blocks of ``request_id``, which ended or is preempted; ``free`` comes here too."""
        blocks = super().pop_blocks_for_free(request_id)
        if self._ledger is not None and self._ledger.config.check_integrity:
            self._leaving += blocks
        return blocks

    def holders(self) -> Counter[int]:
        """How many requests of this group hold each block.

        Raises:
            AssertionError: one of them holds a block twice.

        """
        held: Counter[int] = Counter()
        for request_id, blocks in self.req_to_blocks.items():
            mine = [block.block_id for block in blocks if block is not self._null_block]
            assert len(set(mine)) == len(mine), f"{request_id} holds a block twice"
            held.update(mine)
        return held

    def leaving(self) -> set[int]:
        """Ids of blocks that are, or may be, on their way back to the pool.

        With a connector and steps in flight, the scheduler returns an ended request's blocks only
        when the last of these steps is done (``deferred_frees`` in ``vllm/v1/core/sched``).
        """
        self._leaving = [b for b in self._leaving if b.ref_cnt and not b.is_null]
        return {block.block_id for block in self._leaving}
