"""Worker-side state on the GPU: fixed-point scores, flags by row, copies that nobody waits for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ..config import EvictionConfig
from ..kernels import (
    FRACTION_BITS,
    NEEDED,
    SCORED,
    TOKENS_NEEDED,
    TOKENS_SCORED,
    WINDOW_SHIFT,
)
from ..messages import EvictionPlan, ScoreReport
from ..policies import ATTENTION, KEY_NORM, TOKEN_MASS, TOKENS
from ..request_settings import BLOCK
from .state import WorkerState

COPIES = 4
"""Copies that can be under way at once; vLLM has at most two steps in flight."""


@dataclass(frozen=True)
class Rows:
    """The rows of a step, as known on the host before it runs.

    Attributes:
        flags: int32 ``[num_rows]`` of ``NEEDED``, ``SCORED`` and their like for tokens.
        evicted: int ``[layer groups, num_rows]``, blocks that a row's request has lost so far.

    """

    flags: np.ndarray
    evicted: np.ndarray


class CUDAWorkerState(WorkerState):
    """``WorkerState`` whose numbers live on the GPU.

    ``mass``, ``num_queries``, ``norm``: int64 ``[num_blocks]``; mass and norm are fixed point.
    ``flags``: int32 ``[max rows]``, written before a step, read by its kernels: what a captured
    graph does with a row is decided here, not when it was captured. ``row_of``: a request's place
    in the runner. ``evicted``: blocks that a request has lost so far, by layer group.
    ``warming_up``: the engine starts; every kernel is launched, so that none is compiled later.
    """

    def __init__(self, config: EvictionConfig) -> None:
        super().__init__(config)
        self.log2_decay = math.log2(self.decay)
        self.allocated = False
        self.warming_up = True
        self.row_of: Mapping[str, int] = {}
        self.evicted: dict[str, list[int]] = {}
        # By the runner's index, so that a step's rows are looked up all at once: flags, as if the
        # query were scored, and blocks lost. What is not written yet is in ``_changed``.
        self._index_flags = np.zeros(0, dtype=np.int32)
        self._index_evicted = np.zeros((1, 0), dtype=np.int64)
        self._changed: set[str] = set()
        self.flags = torch.empty(0, dtype=torch.int32)
        self._host_flags: list[torch.Tensor] = []
        self._rows: tuple[int, Rows] | None = None
        self._flags_written = self._copies = 0

    @property
    def channels(self) -> tuple[str, ...]:
        """What this server can be asked to report; nothing else is ever computed."""
        return tuple(c for c in (ATTENTION, KEY_NORM) if c in self.server_needs)

    def allocate(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Room for the scores, and for copies of blocks' scores in pinned host memory."""
        num_blocks = max(cache.shape[0] for cache in kv_caches.values())
        device = next(iter(kv_caches.values())).device
        self.tokens = self.new_token_scores(kv_caches)
        self.mass = torch.zeros(num_blocks, dtype=torch.int64, device=device)
        self.num_queries = torch.zeros_like(self.mass)
        self.norm = torch.zeros_like(self.mass)
        channels = len(self.channels)
        self._staging = torch.zeros(channels, num_blocks, device=device)
        self._divisor = torch.ones_like(self.mass)
        self._pinned = [torch.zeros(channels, num_blocks, pin_memory=True) for _ in range(COPIES)]
        self._arrived = [torch.cuda.Event() for _ in range(COPIES)]
        self.allocated = True

    def allocate_rows(self, num_rows: int, device: torch.device) -> None:
        """Flags for up to ``num_rows`` rows; before anything is captured."""
        if len(self.flags) < num_rows:
            self.flags = torch.zeros(num_rows, dtype=torch.int32, device=device)
            self._host_flags = [
                torch.zeros(num_rows, dtype=torch.int32, pin_memory=True) for _ in range(COPIES)
            ]
            self._flags_written = 0
            self._index_flags = np.zeros(num_rows, dtype=np.int32)
            num_groups = max(self.group_of.values(), default=0) + 1
            self._index_evicted = np.zeros((num_groups, num_rows), dtype=np.int64)

    def release(self) -> None:
        """As everywhere; and the room for copies."""
        super().release()
        self._staging = self._divisor = torch.empty(0)
        self._pinned, self._host_flags = [], []
        self.allocated = False

    def start_step(self, plan: EvictionPlan, finished: set[str]) -> None:
        super().start_step(plan, finished)
        for request_id in finished:
            self.evicted.pop(request_id, None)
            self._changed.discard(request_id)
        for request_id, counts in plan.started.items():
            self.evicted[request_id] = list(counts)
        for request_id, groups in plan.evicted.items():
            counts = self.evicted.setdefault(request_id, [0] * plan.num_groups)
            for group, positions in groups.items():
                counts[group] += len(positions)
        self._changed.update(plan.started, plan.evicted)
        self._rows = None

    def rows(
        self,
        req_idx: np.ndarray | None,
        num_rows: int,
        query_lens: np.ndarray,
        seq_lens: np.ndarray,
    ) -> Rows:
        """This step's rows; made once a step, whatever the number of layer groups.

        Args:
            req_idx: the runner's index of each real row's request, or None in a warm-up.
            num_rows: rows of the batch, padding included.
            query_lens, seq_lens: int ``[num_rows]`` on the host, as scheduled.

        """
        if self._rows is not None and self._rows[0] == num_rows:
            return self._rows[1]
        for request_id in [r for r in self._changed if r in self.row_of]:
            place = self.row_of[request_id]
            self._index_flags[place] = self._flags_of(request_id)
            self._index_evicted[:, place] = self.evicted[request_id]
            self._changed.remove(request_id)
        index = np.zeros(0, dtype=np.int64) if req_idx is None else req_idx[:num_rows]
        flags = np.zeros(num_rows, dtype=np.int32)
        evicted = np.zeros((len(self._index_evicted), num_rows), dtype=np.int64)
        real = slice(len(index))
        flags[real] = self._index_flags[index]
        evicted[:, real] = self._index_evicted[:, index]
        decoded = self.scores_decode(seq_lens - 1, flags >> WINDOW_SHIFT)
        flags[(query_lens <= 1) & ~decoded] &= ~(SCORED | TOKENS_SCORED)
        rows = Rows(flags, evicted)
        if req_idx is not None:
            self._rows = (num_rows, rows)
        self._write_flags(flags)
        return rows

    def _flags_of(self, request_id: str) -> int:
        """Of a step in which the request's queries are scored."""
        needs = self.needs.get(request_id, frozenset())
        flags = self.windows.get(request_id, 0) << WINDOW_SHIFT
        if ATTENTION in needs:
            flags |= NEEDED | SCORED
        if TOKENS in needs:
            flags |= TOKENS_NEEDED | (TOKENS_SCORED if TOKEN_MASS in needs else 0)
        return flags

    def _write_flags(self, flags: np.ndarray) -> None:
        self._flags_written = (self._flags_written + 1) % COPIES
        host = self._host_flags[self._flags_written]
        host[: len(flags)] = torch.from_numpy(flags)
        self.flags[: len(flags)].copy_(host[: len(flags)], non_blocking=True)

    def report(self) -> ScoreReport | None:
        """Enqueue a copy of the scores behind this step; they are read when it has arrived."""
        failures, self.pack_failures = self.pack_failures, {}
        if not self.active or not self.allocated or not self.channels:
            return ScoreReport(self.step, {}, pack_failures=failures) if failures else None
        self._copies = (self._copies + 1) % COPIES
        pinned, arrived = self._pinned[self._copies], self._arrived[self._copies]
        for row, channel in enumerate(self.channels):
            fixed_point = self.mass if channel == ATTENTION else self.norm
            torch.mul(fixed_point, 2.0**-FRACTION_BITS, out=self._staging[row])
            if channel == ATTENTION and self.config.score_at(BLOCK) == "mean":
                torch.clamp(self.num_queries, min=1, out=self._divisor)
                self._staging[row].div_(self._divisor)
        pinned.copy_(self._staging, non_blocking=True)
        arrived.record()
        return ScoreReport(
            self.step, _reader(self.channels, pinned, arrived), pack_failures=failures
        )


def _reader(
    channels: tuple[str, ...], pinned: torch.Tensor, arrived: torch.cuda.Event
) -> Callable[[], dict[str, np.ndarray]]:
    def read() -> dict[str, np.ndarray]:
        arrived.synchronize()
        return {channel: pinned[row].numpy().copy() for row, channel in enumerate(channels)}

    return read
