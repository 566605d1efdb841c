"""Scheduler side: the KV-cache manager of one layer group, which frees evicted blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from .conservation import CountedManager
from .ledger import Ledger
from .prefix_sharing import OWN_QUERIES, Unscored


class EvictableManager(CountedManager, FullAttentionManager):
    """``FullAttentionManager`` plus eviction at the place where vLLM frees skipped blocks.

    Without a ledger (``attach``), it is ``FullAttentionManager``. What may be shared through the
    prefix cache, and how, stands in ``prefix_sharing.py``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._group = 0
        # Requests with blocks to be shared once they are computed: how many blocks they have then,
        # and what vLLM told us to hash them by.
        self._unhashed: dict[str, tuple[Any, int, dict[str, Any]]] = {}
        # Requests that took cached blocks, and those positions among them that somebody holds,
        # until there is a block to copy each to.
        self._taken: dict[str, list[int]] = {}

    def attach(self, ledger: Ledger, group: int) -> None:
        """From now on ``ledger`` decides who is evicted. ``group``: the layer group, which is
        ``kv_cache_group_id`` only where every layer evicts."""
        self._ledger, self._group = ledger, group

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, *args: Any, kv_cache_spec: Any, **options: Any
    ) -> Any:
        """As vLLM's; but where attention is gathered, the last ``OWN_QUERIES`` tokens are computed.

        Attention is summed from a request's own queries on. Of a prompt that was answered before,
        vLLM would compute one token, whose attention says little of the rest. (With several layer
        groups vLLM asks again with what it found, which would be shortened each time.)
        """
        scored = not isinstance(block_hashes, Unscored)
        if scored and getattr(kv_cache_spec, "layer_groups", 1) == 1:
            max_length = max(0, max_length + 1 - OWN_QUERIES)
        return super().find_longest_cache_hit(
            block_hashes, max_length, *args, kv_cache_spec=kv_cache_spec, **options
        )

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
        if self._ledger is None:
            return
        if request_id in self._unhashed:
            self._hash_computed(request_id)
        # Asked at every step for every request, so the usual answer is given here.
        state = self._ledger.requests.get(request_id)
        if state is None or processed_computed_tokens < state.due[self._group]:
            return
        if (blocks := self.req_to_blocks.get(request_id)) is None:
            return
        victims = self._ledger.decide(
            request_id, self._group, processed_computed_tokens, blocks, self._own
        )
        if not victims:
            return
        self._unhashed.pop(request_id, None)
        freed = [blocks[i] for i in victims]
        for i in victims:
            blocks[i] = self._null_block
        self.block_pool.free_blocks(reversed(freed))

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **options: Any) -> None:
        """Blocks that this step computes are hashed when the next one is scheduled.

        vLLM hashes them now, and a request of this same step may share them. Here it could have to
        copy them, which happens before they are computed. A block that an earlier step filled, with
        tokens that were not known then, is hashed at once.
        """
        if self._ledger is None:
            super().cache_blocks(request, num_tokens, *args, **options)
            return
        request_id, num_full = request.request_id, num_tokens // self.block_size
        # Asked twice at every step for every request, so the usual answer is given here.
        num_cached = self.num_cached_block.get(request_id)
        if num_cached is None:
            num_cached = self.num_cached_block[request_id] = 0
        sharing = self._ledger.sharing
        if num_full <= num_cached or num_tokens > sharing.num_exact(request_id):
            return
        self._unhashed[request_id] = (request, num_full, options)
        if request.num_computed_tokens >= num_full * self.block_size:
            self._hash_computed(request_id)
        elif self._group == 0:
            sharing.expect(request.block_hashes[num_cached:num_full], self._ledger.step)

    def _hash_computed(self, request_id: str) -> None:
        """Let others share what is computed, as far as it saw the whole cache before it."""
        if request_id not in self._unhashed or self._ledger is None:
            return
        request, num_full, options = self._unhashed[request_id]
        num_exact = self._ledger.sharing.num_exact(request_id)
        # With steps in flight more may be computed than is known.
        num_tokens = min(request.num_computed_tokens, request.num_tokens, num_exact)
        if num_tokens // self.block_size > self.num_cached_block.get(request_id, 0):
            super().cache_blocks(request, num_tokens, **options)
        if num_tokens >= min(num_full * self.block_size, num_exact):
            del self._unhashed[request_id]

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """As vLLM's, and the copies of cached blocks that somebody holds.

        A prompt is admitted by what it will hold, not by its length: its budget, and what is in
        flight. What a step really takes is counted in full.
        """
        if apply_admission_cap and self._ledger is not None:
            self.max_admission_blocks_per_request = self._ledger.most_blocks(request_id)
        number = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap,
            prefill_end,
        )
        if new_computed_blocks and self._holds_alone(request_id):
            number += sum(block.ref_cnt > 0 for block in new_computed_blocks)
        return number

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Take cached blocks; what somebody holds is copied as soon as all groups have theirs."""
        if new_computed_blocks and self._ledger is not None:
            alone = self._holds_alone(request_id)
            self._taken[request_id] = [
                i for i, block in enumerate(new_computed_blocks) if alone and block.ref_cnt > 0
            ]
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens
        )

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """As vLLM's; first what was taken from the cache becomes the request's."""
        if request_id in self._taken and self._ledger is not None:
            self._replace(request_id, self._taken.pop(request_id), in_table=False)
            ids = [block.block_id for block in self.req_to_blocks[request_id]]
            self._ledger.adopt(request_id, ids)
        return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)

    def _holds_alone(self, request_id: str) -> bool:
        return self._ledger is not None and self._ledger.gathers_attention(request_id)

    def _own(self, request_id: str, positions: Sequence[int]) -> list[int] | None:
        """Ids of blocks of a request that nobody else will read, so that it may write into them:
        copies, where others hold the block or the cache offers it. None: no block is left."""
        blocks = self.req_to_blocks[request_id]
        if self.enable_caching:
            shared = [i for i in positions if blocks[i].ref_cnt > 1 or blocks[i].block_hash]
            if len(shared) > self.block_pool.get_num_free_blocks():
                # The cache can do without a block sooner than a request can wait for one.
                offered = {blocks[i].block_id for i in shared if blocks[i].ref_cnt == 1}
                shared = [i for i in shared if blocks[i].ref_cnt > 1]
                if len(shared) > self.block_pool.get_num_free_blocks():
                    return None
                self.block_pool.evict_blocks(offered)
            self._replace(request_id, shared, in_table=True)
        return [blocks[i].block_id for i in positions]

    def _replace(self, request_id: str, positions: Sequence[int], in_table: bool) -> None:
        """Copies take the place of blocks; the workers make them before they do anything else."""
        if not positions or self._ledger is None:
            return
        blocks = self.req_to_blocks[request_id]
        old = [blocks[i] for i in positions]
        for i, block in zip(positions, self.block_pool.get_new_blocks(len(positions)), strict=True):
            self._ledger.copy(
                request_id,
                self._group,
                blocks[i].block_id,
                block.block_id,
                i if in_table else None,
            )
            blocks[i] = block
        self.block_pool.free_blocks(reversed(old))

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """None: cascade attention reads a prefix through the first request's block table, and
        evicted blocks differ from request to request."""
        return 0

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """All blocks of ``request_id``, which ended or is preempted; ``free`` comes here too."""
        self._hash_computed(request_id)
        self._unhashed.pop(request_id, None)
        self._taken.pop(request_id, None)
        blocks = super().pop_blocks_for_free(request_id)
        if self._ledger is not None:
            self._ledger.release(request_id)
            if self._group == self._ledger.num_groups - 1:
                # The groups before this one may still have asked what others may share.
                self._ledger.sharing.forget(request_id)
        return blocks
