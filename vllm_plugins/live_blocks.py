"""The live blocks of a request in one layer group: who is left, who attended to whom. No vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


class BlockLike(Protocol):
    """The part of ``vllm.v1.core.kv_cache_utils.KVCacheBlock`` that is read."""

    block_id: int


@dataclass
class LiveBlocks:
    """The live blocks of one request in one layer group that are full and processed.

    ``positions`` and ``block_ids`` (int ``[n]``) run in parallel, ascending in position.
    ``num_owned``: the first so many were packed, and are nobody else's.
    ``graph_rows`` holds, for each live block as the one that queries, the attention it gave:
    pairs of (block ids, mass).
    """

    positions: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    block_ids: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    num_seen: int = 0
    num_evicted: int = 0
    num_owned: int = 0
    graph_rows: dict[int, list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)

    def extend(self, num_full_blocks: int, blocks: Sequence[BlockLike]) -> None:
        """Take in blocks that became full and processed since the last call."""
        if num_full_blocks <= self.num_seen:
            return
        full = blocks[self.num_seen : num_full_blocks]
        ids = np.array([block.block_id for block in full], dtype=np.int64)
        new = np.arange(self.num_seen, num_full_blocks)
        self.positions = np.concatenate((self.positions, new))
        self.block_ids = np.concatenate((self.block_ids, ids))
        self.num_seen = num_full_blocks

    def add_graph_row(self, block_id: int, key_ids: np.ndarray, mass: np.ndarray) -> None:
        """Add attention that the queries of ``block_id`` gave to the blocks ``key_ids``."""
        row = self.graph_rows.setdefault(block_id, [])
        if row and np.array_equal(row[-1][0], key_ids):
            row[-1] = (key_ids, row[-1][1] + mass)
        else:
            row.append((key_ids, mass))

    def graph(self, num_blocks: int) -> np.ndarray:
        """Block-to-block attention mass among the live blocks, float ``[n, n]``."""
        n = len(self.positions)
        index = np.full(num_blocks, -1, dtype=np.int64)
        index[self.block_ids] = np.arange(n)
        mass = np.zeros((n, n), dtype=np.float32)
        for i, block_id in enumerate(self.block_ids.tolist()):
            for key_ids, row in self.graph_rows.get(block_id, ()):
                columns = index[key_ids]
                live = columns >= 0
                mass[i, columns[live]] += row[live]
        return mass

    def retain(self, kept: np.ndarray) -> list[int]:
        """Drop all but the indices ``kept``; returns the evicted positions."""
        evicted = np.ones(len(self.positions), dtype=bool)
        evicted[kept] = False
        positions = self.positions[evicted].tolist()
        if self.graph_rows:
            for block_id in self.block_ids[evicted].tolist():
                self.graph_rows.pop(block_id, None)
        self.positions, self.block_ids = self.positions[kept], self.block_ids[kept]
        self.num_evicted += len(positions)
        return positions
