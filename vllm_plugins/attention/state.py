"""Worker-side state: scores per physical block, and what this step has to gather.

One per worker process and engine. The worker makes it (``begin``), attention layers pick it up
while the model is built, the connector reports from it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from ..config import EvictionConfig, EvictionConfigError
from ..messages import EvictionPlan, ScoreReport
from ..platforms import platform
from ..policies import ATTENTION, GRAPH, KEY_NORM
from ..refusals.engine import SENTENCES, is_configured

_state: WorkerState | None = None


def begin(state: WorkerState) -> WorkerState:
    """From now on ``state`` is that of this process's engine."""
    global _state
    _state = state
    return state


def end() -> None:
    """The engine of this process has ended."""
    global _state
    _state = None


def worker_state() -> WorkerState:
    """The state of this process's engine.

    Raises:
        EvictionConfigError: its worker is not ours.

    """
    if _state is None:
        raise EvictionConfigError(SENTENCES["worker"])
    return _state


def attention_state(impl: Any) -> WorkerState | None:
    """What an attention implementation works with; None where eviction is not configured.

    Raises:
        EvictionConfigError: its attention is more than a softmax of scaled products, or its cache
            is quantised (by the checkpoint, which no setting of the engine shows).

    """
    vllm_config = get_current_vllm_config_or_none()
    if not is_configured(vllm_config):
        return None
    if is_quantized_kv_cache(impl.kv_cache_dtype):
        raise EvictionConfigError(SENTENCES["kv_cache_dtype"].format(dtype=impl.kv_cache_dtype))
    if impl.alibi_slopes is not None or impl.sinks is not None:
        raise EvictionConfigError(
            "the model uses ALiBi or learned attention sinks, which the scores do not know; "
            "use a model with rotary positions and plain softmax attention"
        )
    return worker_state()


class WorkerState:
    """Scores of all blocks, needs of all requests, time spent.

    ``mass``, ``num_queries``, ``norm``: float32 ``[num_blocks]``, indexed by physical block; a
    block's numbers start at zero when its first token is written.
    """

    def __init__(self, config: EvictionConfig) -> None:
        self.config = config
        self.decay = 0.5 ** (1.0 / config.score_half_life) if config.score == "decay" else 1.0
        self.window = None if config.score_queries == "all" else int(config.score_queries)
        self.server_needs = config.needs() & platform().gathers
        self.first_layers: frozenset[str] = frozenset()
        self.scored_layers: frozenset[str] = frozenset()
        self.group_of: Mapping[str, int] = {}
        self.row_ids: Sequence[str] | Mapping[int, str] = ()
        self.step = 0
        self.needs: dict[str, frozenset[str]] = {}
        self.mass = self.num_queries = self.norm = torch.empty(0)
        self.graph: dict[tuple[str, int, int], tuple[np.ndarray, np.ndarray]] = {}
        self.seconds: dict[str, float] = {}

    def set_layers(self, group_of: Mapping[str, int]) -> None:
        """Layer name to layer group, in order of execution."""
        self.group_of = dict(group_of)
        by_group: dict[int, list[str]] = {}
        for name, group in group_of.items():
            by_group.setdefault(group, []).append(name)
        groups = by_group.values()
        self.first_layers = frozenset(names[0] for names in groups)
        every = self.config.score_layers
        self.scored_layers = frozenset(name for names in groups for name in names[::every])

    def allocate(self, num_blocks: int, device: torch.device) -> None:
        """Room for one number per physical block and channel."""
        self.mass = torch.zeros(num_blocks)
        self.num_queries = torch.zeros(num_blocks)
        self.norm = torch.zeros(num_blocks)

    def start_step(self, plan: EvictionPlan, finished: set[str]) -> None:
        """A step begins: note its number and what its requests need."""
        self.step = plan.step
        for request_id in finished:
            self.needs.pop(request_id, None)
        self.needs.update(plan.needs)
        self.graph.clear()
        self.seconds = {}

    def wants(self, channel: str) -> bool:
        """Whether some request in the batch may need ``channel``."""
        return channel in self.server_needs and any(channel in n for n in self.needs.values())

    @property
    def active(self) -> bool:
        """Whether any score is kept at all just now."""
        return any(needs - {"rng"} for needs in self.needs.values())

    def scores_query_at(self, position: int) -> bool:
        """Whether a decode's query at ``position`` is scored (chunks always are).

        By place in the sequence, not by step: who else is in the batch changes nothing.
        """
        return position % self.config.score_every == 0

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time of the block to ``seconds[phase]``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - started
            self.seconds[phase] = self.seconds.get(phase, 0.0) + elapsed

    def report(self) -> ScoreReport | None:
        """What the scheduler learns after this step; None while nobody needs scores."""
        if not self.active:
            return None
        scores = {}
        if self.wants(ATTENTION) or self.wants(GRAPH):
            mass = self.mass
            if self.config.score == "mean":
                mass = mass / self.num_queries.clamp(min=1.0)
            scores[ATTENTION] = mass.numpy().copy()
        if self.wants(KEY_NORM):
            scores[KEY_NORM] = self.norm.numpy().copy()
        graph = [(*key, ids, mass) for key, (ids, mass) in self.graph.items()]
        return ScoreReport(self.step, scores, graph, self.seconds)

    def add_graph_rows(
        self, request_id: str, group: int, block_ids: torch.Tensor, rows: torch.Tensor
    ) -> None:
        """Add a layer's block-to-block mass: the last ``len(rows)`` blocks query all of them."""
        ids = block_ids.numpy()
        for i, row in enumerate(rows.numpy()):
            key = (request_id, group, int(ids[len(ids) - len(rows) + i]))
            known = self.graph.get(key)
            self.graph[key] = (ids, row.copy() if known is None else known[1] + row)
