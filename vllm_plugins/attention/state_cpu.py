"""Worker-side state on the CPU: float scores, block-to-block mass, and where the time went."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from ..config import EvictionConfig
from ..messages import EvictionPlan, ScoreReport
from ..policies import ATTENTION, GRAPH, KEY_NORM
from ..request_settings import BLOCK
from .state import WorkerState


class CPUWorkerState(WorkerState):
    """``WorkerState`` whose numbers are float32 tensors.

    ``row_ids``: request ids of the batch, in the order of its rows. ``graph``: (request id, group,
    querying block) to (key blocks, mass), of this step. ``seconds``: by phase, of this step.
    """

    def __init__(self, config: EvictionConfig) -> None:
        super().__init__(config)
        self.row_ids: Sequence[str] = ()
        self.graph: dict[tuple[str, int, int], tuple[np.ndarray, np.ndarray]] = {}
        self.seconds: dict[str, float] = {}

    def allocate(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        num_blocks = max(cache.shape[0] for cache in kv_caches.values())
        self.tokens = self.new_token_scores(kv_caches)
        self.mass = torch.zeros(num_blocks)
        self.num_queries = torch.zeros(num_blocks)
        self.norm = torch.zeros(num_blocks)

    def start_step(self, plan: EvictionPlan, finished: set[str]) -> None:
        super().start_step(plan, finished)
        self.graph.clear()
        self.seconds = {}

    def wants(self, channel: str) -> bool:
        """Whether some request in the batch may need ``channel``."""
        return channel in self.server_needs and any(channel in n for n in self.needs.values())

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time of the block to ``seconds[phase]``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - started
            self.seconds[phase] = self.seconds.get(phase, 0.0) + elapsed

    def add_graph_rows(
        self, request_id: str, group: int, block_ids: torch.Tensor, rows: torch.Tensor
    ) -> None:
        """Add a layer's block-to-block mass: the last ``len(rows)`` blocks query all of them.

        Args:
            request_id: whose blocks they are.
            group: layer group.
            block_ids: int64 ``[n]``, live blocks in order.
            rows: float32 ``[<= n, n]``, a row per block that queries.

        """
        ids = block_ids.numpy()
        for i, row in enumerate(rows.numpy()):
            key = (request_id, group, int(ids[len(ids) - len(rows) + i]))
            known = self.graph.get(key)
            self.graph[key] = (ids, row.copy() if known is None else known[1] + row)

    def report(self) -> ScoreReport | None:
        """The scores themselves: on a CPU they are there when the step is."""
        failures, self.pack_failures = self.pack_failures, {}
        if not (self.active or self.seconds or failures):
            return None
        scores = {}
        if self.wants(ATTENTION) or self.wants(GRAPH):
            mass = self.mass
            if self.config.score_at(BLOCK) == "mean":
                mass = mass / self.num_queries.clamp(min=1.0)
            scores[ATTENTION] = mass.numpy().copy()
        if self.wants(KEY_NORM):
            scores[KEY_NORM] = self.norm.numpy().copy()
        graph = [(*key, ids, mass) for key, (ids, mass) in self.graph.items()]
        return ScoreReport(self.step, scores, graph, self.seconds, failures)
