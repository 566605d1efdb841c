"""Numbers of all current requests, side by side: what changes at every step is done at once.

A step of 512 requests would else cost a millisecond of Python for nothing but counting. No vLLM.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np


class RequestTable:
    """A row for each request, int64 ``[rows]`` by column. A row that ends is used again.

    Attributes:
        scored: tokens that the newest reported scores include; 0 where no report is waited for.
        seen, evicted: full blocks of a request that evicts, and those of them that went, over all
            layer groups.
        steps, block_steps: steps, and the blocks held in each of them, summed.
        peak_blocks: most blocks held in a step, over all layer groups.
        peak_pool: most blocks in use in the whole pool in a step of the request.

    """

    columns = ("scored", "seen", "evicted", "steps", "block_steps", "peak_blocks", "peak_pool")
    scored: np.ndarray
    seen: np.ndarray
    evicted: np.ndarray
    steps: np.ndarray
    block_steps: np.ndarray
    peak_blocks: np.ndarray
    peak_pool: np.ndarray

    def __init__(self, block_size: int, num_groups: int, num_rows: int = 64) -> None:
        self._block_size, self._num_groups = block_size, num_groups
        for name in self.columns:
            setattr(self, name, np.zeros(num_rows, dtype=np.int64))
        self._reported = np.zeros(num_rows, dtype=np.int64)
        self._evicts = np.zeros(num_rows, dtype=np.int64)
        self._life = np.zeros(num_rows, dtype=np.int64)
        """Changes when what is under way no longer concerns a row."""
        self._free = list(range(num_rows))[::-1]
        self._under_way: deque[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = deque()

    def add(self, evicts: bool, reported: bool) -> int:
        """A row of zeros, for a request that may lose blocks (``evicts``) and for which the workers
        report scores (``reported``)."""
        if not self._free:
            num_rows = len(self._life)
            for name in (*self.columns, "_evicts", "_reported", "_life"):
                column = getattr(self, name)
                setattr(self, name, np.concatenate((column, np.zeros_like(column))))
            self._free = list(range(num_rows, 2 * num_rows))[::-1]
        row = self._free.pop()
        for name in self.columns:
            getattr(self, name)[row] = 0
        self._evicts[row], self._reported[row] = evicts, reported
        self._life[row] += 1
        return row

    def remove(self, row: int) -> None:
        """A request ended."""
        self.seen[row] = self.evicted[row] = 0
        self._life[row] += 1
        self._free.append(row)

    def restart(self, row: int) -> None:
        """A request lost its blocks; what it held before stays counted."""
        self.scored[row] = self.seen[row] = self.evicted[row] = 0
        self._life[row] += 1

    def begin_step(
        self, step: int, rows: Sequence[int], num_tokens: Sequence[int], num_pool_blocks: int
    ) -> None:
        """A step was scheduled.

        Args:
            step: its number.
            rows: of the requests that take part, none twice.
            num_tokens: that they will have after it; their tables are as long.
            num_pool_blocks: in use.

        """
        if not rows:
            return
        index, tokens = np.asarray(rows), np.asarray(num_tokens)
        table = -(-tokens // self._block_size) * self._num_groups
        held = table - self.evicted[index]
        self.seen[index] = tokens // self._block_size * self._num_groups * self._evicts[index]
        self.steps[index] += 1
        self.block_steps[index] += held
        self.peak_blocks[index] = np.maximum(self.peak_blocks[index], held)
        self.peak_pool[index] = np.maximum(self.peak_pool[index], num_pool_blocks)
        waiting = self._reported[index] > 0
        if waiting.any():  # else no report may ever come to take this away again
            index = index[waiting]
            self._under_way.append((step, index, self._life[index], tokens[waiting]))

    def end_steps(self, step: int) -> None:
        """The reported scores include every step up to ``step``."""
        while self._under_way and self._under_way[0][0] <= step:
            _, index, life, tokens = self._under_way.popleft()
            same = self._life[index] == life
            index, tokens = index[same], tokens[same]
            self.scored[index] = np.maximum(self.scored[index], tokens)
