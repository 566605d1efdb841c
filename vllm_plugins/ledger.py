"""Scheduler-side bookkeeping: which blocks are live, what they scored, who is evicted.

Data flows one way: the connector writes what is known (``admit``, ``schedule``, ``observe``),
the KV-cache managers ask ``decide``, the connector takes the decisions away
(``take_evictions``) and hands out a request's record when it ends (``finish``). No vLLM
object is kept but the request, of which a few public fields are read.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from .config import EvictionConfig, RequestSettings
from .policies import ATTENTION, GRAPH, KEY_NORM, RNG, get_policy

logger = logging.getLogger("vllm.kv_eviction")


class RequestLike(Protocol):
    """The part of ``vllm.v1.request.Request`` that decisions depend on."""

    request_id: str
    num_prompt_tokens: int

    @property
    def num_tokens(self) -> int: ...

    num_preemptions: int

    def is_finished(self) -> bool: ...


class BlockLike(Protocol):
    """The part of ``vllm.v1.core.kv_cache_utils.KVCacheBlock`` that is read."""

    block_id: int


@dataclass
class LiveBlocks:
    """The live blocks of one request in one layer group that are full and processed.

    ``positions`` and ``block_ids`` (int ``[n]``) run in parallel, ascending in position.
    ``graph_rows`` holds, for each live block as the one that queries, the attention it gave:
    pairs of (block ids, mass).
    """

    positions: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    block_ids: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    num_seen: int = 0
    num_evicted: int = 0
    graph_rows: dict[int, list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)

    def extend(self, num_full_blocks: int, blocks: Sequence[BlockLike]) -> None:
        """Take in blocks that became full and processed since the last call."""
        if num_full_blocks <= self.num_seen:
            return
        new = range(self.num_seen, num_full_blocks)
        ids = np.fromiter((blocks[i].block_id for i in new), dtype=np.int64, count=len(new))
        self.positions = np.concatenate((self.positions, np.arange(new.start, new.stop)))
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


@dataclass
class RequestState:
    """Everything known of one request between admission and end."""

    request: RequestLike
    settings: RequestSettings
    seed: int
    groups: list[LiveBlocks]
    rng: np.random.Generator | None = None
    num_scored_tokens: int = 0
    in_flight: dict[int, int] = field(default_factory=dict)
    steps: int = 0
    blocks_steps: float = 0.0
    record: dict[str, Any] = field(default_factory=dict)

    def restart(self) -> None:
        """Forget what died with the blocks of a preempted request."""
        self.groups = [LiveBlocks() for _ in self.groups]
        self.num_scored_tokens = 0
        self.in_flight.clear()
        self.rng = np.random.default_rng(self.seed) if RNG in self.settings.needs else None


class Ledger:
    """Decides evictions for all requests of one engine.

    Args:
        config: server-wide settings.
        block_size: tokens per block.
        num_groups: layer groups (KV-cache groups of vLLM).
        num_blocks: physical blocks in the pool.

    """

    def __init__(
        self, config: EvictionConfig, block_size: int, num_groups: int, num_blocks: int
    ) -> None:
        self.config = config
        self.block_size = block_size
        self.num_groups = num_groups
        self.num_blocks = num_blocks
        self.requests: dict[str, RequestState] = {}
        self.totals: Counter[str] = Counter()
        self.requests_by_policy: Counter[str] = Counter()
        self._step = 0
        self._scores: dict[str, np.ndarray] = {}
        self._pending: dict[str, dict[int, list[int]]] = {}
        self._logged: set[str] = set()

    def admit(
        self, request: RequestLike, settings: RequestSettings, seed: int, refused: str | None = None
    ) -> None:
        """A request arrived. ``refused``: why its own settings were replaced by the server's."""
        state = RequestState(
            request, settings, seed, [LiveBlocks() for _ in range(self.num_groups)]
        )
        state.restart()
        state.record = {
            "policy": settings.policy,
            "sparsity": settings.sparsity,
            "budget_tokens": settings.budget_tokens,
            "blocks_evicted": 0,
            "decisions": 0,
            "decision_seconds": 0.0,
            "first_eviction_tokens": None,
            "peak_blocks": 0.0,
            "peak_pool_blocks": 0,
        }
        if refused is not None:
            state.record["refused_settings"] = refused
            self.totals["refused_settings"] += 1
            self._log_once(f"request settings refused, the server's apply: {refused}")
        if self.config.trace_decisions:
            state.record["trace"] = []
        self.requests[request.request_id] = state
        self.requests_by_policy[settings.policy] += 1

    def schedule(self, num_tokens_after: dict[str, int]) -> int:
        """A step was scheduled after which requests have so many tokens; returns its number."""
        self._step += 1
        for request_id, num_tokens in num_tokens_after.items():
            state = self.requests.get(request_id)
            if state is not None and state.settings.needs:
                state.in_flight[self._step] = num_tokens
        return self._step

    def observe(
        self,
        step: int,
        scores: dict[str, np.ndarray],
        graph: Sequence[tuple[str, int, int, np.ndarray, np.ndarray]] = (),
    ) -> None:
        """Scores as they stood after ``step``.

        Args:
            step: the number ``schedule`` gave to the newest step the scores include.
            scores: ``ATTENTION`` and/or ``KEY_NORM`` to float ``[num_blocks]``.
            graph: (request id, group, querying block, key blocks, mass) of that step.

        """
        self._scores = scores
        for state in self.requests.values():
            for done in [s for s in state.in_flight if s <= step]:
                state.num_scored_tokens = max(state.num_scored_tokens, state.in_flight.pop(done))
        for request_id, group, block_id, key_ids, mass in graph:
            state = self.requests.get(request_id)
            # A row that was on its way when its request was preempted describes freed blocks.
            if state is not None and state.num_scored_tokens > 0:
                state.groups[group].add_graph_row(block_id, key_ids, mass)

    def decide(
        self,
        request_id: str,
        group: int,
        num_processed_tokens: int,
        blocks: Sequence[BlockLike],
    ) -> list[int]:
        """The positions of the blocks that ``request_id`` loses now in ``group``, ascending.

        Only full blocks below ``num_processed_tokens`` (no step in flight reads them any more)
        are considered, and only blocks whose last token the reported scores include, so that
        a reused block cannot inherit its former owner's score.
        """
        state = self.requests.get(request_id)
        if state is None or not state.settings.evicts or state.request.is_finished():
            return []
        needs = state.settings.needs
        if needs & {ATTENTION, KEY_NORM, GRAPH}:
            num_processed_tokens = min(num_processed_tokens, state.num_scored_tokens)
        live = state.groups[group]
        live.extend(min(num_processed_tokens // self.block_size, len(blocks)), blocks)
        num_tokens = max(state.request.num_prompt_tokens, state.request.num_tokens)
        keep = state.settings.keep(num_tokens, self.block_size, self.config.min_blocks)
        if len(live.positions) <= keep or "policy_error" in state.record:
            return []
        started = time.perf_counter()
        try:
            kept = self._select(state, live, keep)
        except Exception as error:
            # A third party's policy must not take the engine down; the request goes on whole.
            state.record["policy_error"] = f"{type(error).__name__}: {error}"
            self.totals["policy_errors"] += 1
            self._log_once(f"policy {state.settings.policy} failed, nothing evicted: {error!r}")
            return []
        evicted = live.retain(kept)
        seconds = time.perf_counter() - started
        self._account(state, group, num_processed_tokens, live, evicted, seconds)
        return evicted

    def _select(self, state: RequestState, live: LiveBlocks, keep: int) -> np.ndarray:
        settings = state.settings
        needs = settings.needs
        extra: dict[str, Any] = {}
        if GRAPH in needs:
            extra["graph"] = live.graph(self.num_blocks)
        if RNG in needs:
            extra["rng"] = state.rng
        channel = ATTENTION if ATTENTION in needs else KEY_NORM
        if channel in needs:
            scores = self._scores[channel][live.block_ids]
        else:
            scores = np.zeros(len(live.positions))
        for told in (scores, *((extra["graph"],) if "graph" in extra else ())):
            # Comparisons with NaN are false: a policy would keep too little and not notice.
            if not np.isfinite(told).all():
                raise ValueError("the scores hold NaN or infinity")
        kept = get_policy(settings.policy).select(
            scores,
            live.positions,
            keep,
            num_sink_blocks=self.config.sink_blocks,
            **extra,
            **settings.policy_args,
        )
        return checked(kept, live.positions, keep, self.config.sink_blocks)

    def _account(
        self,
        state: RequestState,
        group: int,
        num_tokens: int,
        live: LiveBlocks,
        evicted: list[int],
        seconds: float,
    ) -> None:
        record = state.record
        record["decisions"] += 1
        record["decision_seconds"] += seconds
        record["blocks_evicted"] += len(evicted)
        if record["first_eviction_tokens"] is None:
            record["first_eviction_tokens"] = num_tokens
        if "trace" in record:
            record["trace"].append(
                {"group": group, "tokens": num_tokens, "kept": live.positions.tolist()}
            )
        self.totals["decisions"] += 1
        self.totals["decision_seconds"] += seconds
        self.totals["blocks_evicted"] += len(evicted)
        pending = self._pending.setdefault(state.request.request_id, {})
        pending.setdefault(group, []).extend(evicted)

    def note_blocks(self, request_id: str, num_table_blocks: int, num_pool_blocks: int) -> None:
        """After allocation: ``request_id`` has tables of ``num_table_blocks`` (nulls included,
        summed over groups), and the pool has ``num_pool_blocks`` in use."""
        state = self.requests.get(request_id)
        if state is None:
            return
        evicted = sum(live.num_evicted for live in state.groups)
        blocks = (num_table_blocks - evicted) / self.num_groups
        record = state.record
        record["peak_blocks"] = max(record["peak_blocks"], blocks)
        record["peak_pool_blocks"] = max(record["peak_pool_blocks"], num_pool_blocks)
        state.steps += 1
        state.blocks_steps += blocks

    def take_evictions(self) -> dict[str, dict[int, list[int]]]:
        """Victims since the last call: ``{request_id: {group: [position, ...]}}``."""
        pending, self._pending = self._pending, {}
        return pending

    def release(self, request_id: str) -> None:
        """The blocks of a request were freed: it ended or was preempted. Safe to repeat."""
        self._pending.pop(request_id, None)
        state = self.requests.get(request_id)
        if state is not None:
            state.restart()

    def finish(self, request_id: str) -> dict[str, Any]:
        """Forget a request and return its record (counts; blocks per layer group's average)."""
        state = self.requests.pop(request_id, None)
        self._pending.pop(request_id, None)
        if state is None:
            return {}
        average = state.blocks_steps / state.steps if state.steps else 0.0
        return {
            **state.record,
            "effective_sparsity": state.settings.effective_sparsity(
                max(state.request.num_prompt_tokens, state.request.num_tokens),
                self.block_size,
                self.config.min_blocks,
            ),
            "average_blocks": average,
            "num_steps": state.steps,
            "block_size": self.block_size,
            "preemptions": state.request.num_preemptions,
        }

    @property
    def live_share(self) -> float | None:
        """Share still held of the full blocks of current requests that evict; None: no such."""
        groups = [live for state in self.requests.values() for live in state.groups]
        seen = sum(live.num_seen for live in groups)
        return 1.0 - sum(live.num_evicted for live in groups) / seen if seen else None

    def _log_once(self, message: str) -> None:
        if message not in self._logged and len(self._logged) < 100:
            self._logged.add(message)
            logger.warning("%s (reported once)", message)


def checked(kept: np.ndarray, positions: np.ndarray, keep: int, num_sink_blocks: int) -> np.ndarray:
    """``kept`` if it honours the contract of ``Policy.select``.

    Raises:
        ValueError: which part of the contract is broken.

    """
    kept = np.asarray(kept)
    if kept.ndim != 1 or kept.dtype.kind not in "iu":
        raise ValueError(f"select must return a 1-D array of indices, got {kept!r}")
    if len(kept) > keep:
        raise ValueError(f"select kept {len(kept)} blocks of a budget of {keep}")
    if len(kept) == 0 or kept[0] < 0 or not (kept[1:] > kept[:-1]).all():
        raise ValueError("select must return ascending indices without repeats")
    if kept[-1] != len(positions) - 1:
        raise ValueError("select must keep the last block, and no index beyond it")
    num_sinks = int(np.searchsorted(positions, num_sink_blocks))
    if num_sinks and (len(kept) < num_sinks or kept[num_sinks - 1] != num_sinks - 1):
        raise ValueError(f"select must keep the {num_sinks} sink blocks")
    return kept
