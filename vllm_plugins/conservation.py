"""Conservation of blocks, for ``check_integrity``: who holds each one, and is it free otherwise.

A pool of default memory has up to millions of blocks, so all are looked at together, in NumPy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from .attention.compaction import NULL_BLOCK
from .ledger import Ledger

if TYPE_CHECKING:
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager as _Manager
else:
    _Manager = object

_block_id, _ref_cnt = attrgetter("block_id"), attrgetter("ref_cnt")


def _ids(blocks: Iterable[KVCacheBlock]) -> np.ndarray:
    return np.fromiter(map(_block_id, blocks), dtype=np.int64)


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

    def held(self) -> np.ndarray:
        """Ids of the blocks in this group's tables: one that several requests hold, several times.

        Raises:
            AssertionError: one of them holds a block twice.

        """
        tables = self.req_to_blocks
        ids = _ids(chain.from_iterable(tables.values()))
        real = ids != NULL_BLOCK
        ascending = np.sort(ids[real])
        repeated = ascending[1:][ascending[1:] == ascending[:-1]]
        if len(repeated):
            owners = np.repeat(np.arange(len(tables)), [len(table) for table in tables.values()])
            several = np.isin(ids, repeated)
            pairs = np.stack((owners[several], ids[several]))
            pairs, times = np.unique(pairs, axis=1, return_counts=True)
            twice = [list(tables)[owner] for owner in pairs[0, times > 1]]
            assert not twice, f"{twice[0]} holds a block twice"
        return ids[real]

    def take_leaving(self) -> np.ndarray:
        """Ids of the blocks that ended requests gave back since the last call."""
        blocks, self._leaving = self._leaving, []
        return _ids(blocks)


class Conservation:
    """Over all KV-cache groups of one pool.

    With a connector and steps in flight, the scheduler returns an ended request's blocks only when
    the last of these steps is done (``deferred_frees`` in ``vllm/v1/core/sched``). Until then a
    block has a reference without a holder.

    Attributes:
        leaving: the blocks of such references, as the last check found them.

    """

    def __init__(self, pool: Any, managers: Sequence[CountedManager]) -> None:
        self._pool, self._managers = pool, managers
        self.leaving = np.empty(0, dtype=np.int64)

    def check(self) -> None:
        """A block is free, or referenced by exactly those that hold it or leave it.

        Raises:
            AssertionError: which equation does not hold.

        """
        size = self._pool.num_gpu_blocks
        references = np.fromiter(map(_ref_cnt, self._pool.blocks), dtype=np.int32, count=size)
        references[NULL_BLOCK] = 0
        blocks = np.flatnonzero(references)

        def count(ids: np.ndarray) -> np.ndarray:
            """How often each of ``blocks`` is among ``ids``."""
            ids = ids[references[ids] != 0]
            return np.bincount(np.searchsorted(blocks, ids), minlength=len(blocks))

        held = [manager.held() for manager in self._managers]
        lost = [block for ids in held for block in ids[references[ids] == 0].tolist()]
        assert not lost, f"block {lost[0]}: 0 references, and it is held"
        by_group = np.array([count(ids) for ids in held])
        several = blocks[(by_group > 0).sum(axis=0) > 1].tolist()
        assert not several, f"blocks {several} are held by two KV-cache groups"
        # Who left may return its blocks at any time, and has no others.
        new = [manager.take_leaving() for manager in self._managers]
        holders, most = by_group.sum(axis=0), count(np.concatenate((self.leaving, *new)))
        leaving = references[blocks] - holders
        for i in np.flatnonzero((leaving < 0) | (leaving > most))[:1]:
            counts = f"{references[blocks[i]]} references, {holders[i]} holders, {most[i]} leaving"
            raise AssertionError(f"block {blocks[i]}: {counts}")
        self.leaving = np.repeat(blocks, leaving)
        free, total = self._pool.get_num_free_blocks(), size - 1  # one is the null block
        assert free + len(blocks) == total, f"{free} free + {len(blocks)} held != {total} blocks"
