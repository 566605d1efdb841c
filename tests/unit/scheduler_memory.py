"""vLLM's scheduler over a model of the workers' memory: what stands in every block, and whose.

    vLLM's scheduler, our connector, ledger and managers     as in an engine
        | SchedulerOutput with its EvictionPlan
    SimulatedWorker                                          ``waves`` and block tables, no tensors
        | labels
    Memory                                                   [num_blocks, block_size]

A label stands for a token's keys and values. Where a token saw the whole cache before it, its label
follows from the tokens up to it, so that equal prefixes have equal labels. Everything else has a
label that occurs once: what saw an evicted cache, and what a pack wrote.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    get_block_hash,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_plugins import eviction_engine_args
from vllm_plugins.attention.compaction import NULL_BLOCK
from vllm_plugins.ledger import Ledger
from vllm_plugins.manager import EvictableManager
from vllm_plugins.messages import EvictionPlan, ScoreReport
from vllm_plugins.packs import Pack
from vllm_plugins.policies import ATTENTION, KEY_NORM
from vllm_plugins.spec import EvictableSpec, layer_groups
from vllm_plugins.window import WindowSpec
from vllm_plugins.worker import table_changes, waves

BLOCK_SIZE = 32
WINDOW = 96
VOCABULARY = 7
"""Few tokens: continuations of one prefix often agree for a while."""
MOST_IDLE_STEPS = 50


def next_label(label: int, token: int) -> int:
    """Of a token that saw everything before it; ``label`` is the one before."""
    return hash((label, token)) & (2**62 - 1)


class Memory:
    """The physical blocks, which all layer groups share.

    Attributes:
        labels: int ``[num_blocks, BLOCK_SIZE]``.
        scored_by: the request's start that each block's scores are of.

    """

    def __init__(self, num_blocks: int) -> None:
        self.labels = np.zeros((num_blocks, BLOCK_SIZE), dtype=np.int64)
        self.scored_by = np.zeros(num_blocks, dtype=np.int64)
        self._unique = count(1)

    def copy(self, block: int, copy: int) -> None:
        self.labels[copy] = self.labels[block]
        self.scored_by[copy] = self.scored_by[block]

    def unique(self, number: int) -> list[int]:
        """Labels that nothing else has: negative ones."""
        return [-next(self._unique) for _ in range(number)]


@dataclass
class WorkerRequest:
    """What a worker knows of a request, and what must stand in its blocks.

    Attributes:
        tokens: prompt, and answers as far as they were sampled.
        exact: the labels of ``tokens``, had all of them seen the whole cache.
        start: number of its last start; a preempted request starts again.
        gathers: attention is summed with its blocks, whose scores must be its own.
        evicted: something has left its cache since it started.
        tables: blocks by KV-cache group.
        expected: labels by KV-cache group and position in the table.

    """

    tokens: list[int] = field(default_factory=list)
    exact: list[int] = field(default_factory=list)
    start: int = 0
    gathers: bool = False
    evicted: bool = False
    tables: list[list[int]] = field(default_factory=list)
    expected: list[dict[int, np.ndarray]] = field(default_factory=list)

    def append(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self.tokens.append(token)
            self.exact.append(next_label(self.exact[-1] if self.exact else 1, token))

    def check(
        self,
        memory: Memory,
        group: int,
        position: int,
        num_tokens: int = BLOCK_SIZE,
        gathered: bool = True,
    ) -> None:
        """A block holds its first tokens, and if any are ``gathered``, this request's scores."""
        block = self.tables[group][position]
        where = f"group {group}, position {position}, block {block}"
        expected = self.expected[group][position][:num_tokens]
        assert (memory.labels[block, :num_tokens] == expected).all(), f"{where}: other contents"
        if self.gathers and gathered:
            assert memory.scored_by[block] == self.start, f"{where}: another's scores"


class SimulatedWorker:
    """Does with labels what ``EvictionWorkerMixin`` and a model runner do with tensors.

    Args:
        num_blocks: in the pool.
        ledger: of the scheduler.
        evicting: the KV-cache groups that evict, in order; the others have a window.

    Attributes:
        counts: what the plans asked for, by kind.

    """

    def __init__(self, num_blocks: int, ledger: Ledger, evicting: Sequence[int]) -> None:
        self.memory = Memory(num_blocks)
        self.requests: dict[str, WorkerRequest] = {}
        self.counts: Counter[str] = Counter()
        self._ledger, self._evicting = ledger, evicting
        self._starts = count(1)

    def execute(self, output: Any) -> dict[str, list[int]]:
        """One step; returns the sampled tokens of its requests."""
        for name in output.finished_req_ids:
            self.requests.pop(name, None)
        plan, cached = output.kv_connector_metadata, output.scheduled_cached_reqs
        started = {new.req_id: new.block_ids for new in output.scheduled_new_reqs}
        appended = dict(zip(cached.req_ids, cached.new_block_ids, strict=True))
        started |= {name: appended.pop(name) for name in cached.resumed_req_ids}
        assert not started.keys() & plan.packs.keys(), "a pack of a request that has no table"
        assert not started.keys() & plan.evicted.keys(), "an eviction where there is no table"
        self._prepare_blocks(plan)
        self._update_tables(plan)
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for new in output.scheduled_new_reqs:
            computed[new.req_id] = new.num_computed_tokens
            if new.req_id not in self.requests:
                self.requests[new.req_id] = WorkerRequest()
                self.requests[new.req_id].append(new.prompt_token_ids)
        for name, tables in started.items():
            self._start(name, tables, computed[name], plan)
        for name, blocks in appended.items():
            for table, more in zip(self.requests[name].tables, blocks or (), strict=bool(blocks)):
                table += more
        ends = {name: computed[name] + n for name, n in output.num_scheduled_tokens.items()}
        for name, end in ends.items():
            self._write(self.requests[name], computed[name], end)
        for name, end in ends.items():
            self._read(self.requests[name], computed[name], end)
        return {name: self._sample(self.requests[name], end) for name, end in ends.items()}

    def _prepare_blocks(self, plan: EvictionPlan) -> None:
        """Copies and packs, in the order that the worker makes of the plan."""
        for wave in waves(plan):
            for _, block, copy in wave.copies:
                self.memory.copy(block, copy)
            self.counts["copies"] += len(wave.copies)
            for name, packs in wave.packs.items():
                takeover = plan.takeovers.get(name)
                for pack in packs:
                    replaced = takeover.replaced.get(pack.group, {}) if takeover else {}
                    self._pack(self.requests[name], pack, replaced)

    def _pack(self, request: WorkerRequest, pack: Pack, replaced: dict[int, int]) -> None:
        """A pack reads the first blocks that its request still has, and each is as it was left."""
        group = self._evicting[pack.group]
        table = request.tables[group]
        for position, block in replaced.items():
            table[position] = block
        live = [position for position, block in enumerate(table) if block != NULL_BLOCK]
        candidates = live[: len(pack.block_ids)]
        assert [table[position] for position in candidates] == pack.block_ids
        for position in candidates:
            request.check(self.memory, group, position)
        for position in candidates[: pack.num_kept_blocks]:
            packed = self.memory.unique(BLOCK_SIZE)
            self.memory.labels[table[position]] = packed
            request.expected[group][position] = np.array(packed)
        self.counts["packs"] += 1

    def _update_tables(self, plan: EvictionPlan) -> None:
        """Only entries that hold a block change."""
        for name, groups in table_changes(plan, self._evicting).items():
            request = self.requests[name]
            for group, blocks in groups.items():
                for position, block in blocks.items():
                    assert request.tables[group][position] != NULL_BLOCK, "evicted twice"
                    request.tables[group][position] = block
        for name, evicted in plan.evicted.items():
            self.requests[name].evicted = True
            self.counts["evicted blocks"] += sum(map(len, evicted.values()))

    def _start(
        self, name: str, tables: Sequence[Sequence[int]], num_cached: int, plan: EvictionPlan
    ) -> None:
        """Blocks from the prefix cache hold the request's own first tokens, in all groups; if it
        needs scores, the plan names each of them that evicts, and its place."""
        request = self.requests[name]
        self.counts["preemptions"] += request.start > 0
        request.start = next(self._starts)
        request.gathers, request.evicted = self._ledger.gathers_attention(name), False
        request.tables = [list(table) for table in tables]
        assert num_cached % BLOCK_SIZE == 0
        places = range(num_cached // BLOCK_SIZE)
        blocks = np.array(request.exact[:num_cached], dtype=np.int64).reshape(-1, BLOCK_SIZE)
        request.expected = [{place: blocks[place].copy() for place in places} for _ in tables]
        if self._ledger.requests[name].settings.needs:
            takeover = plan.takeovers.get(name)
            adopted = takeover.adopted if takeover else []
            wanted = [(request.tables[g][place], place) for g in self._evicting for place in places]
            assert adopted == wanted
            self.counts["adopted blocks"] += len(adopted)
            if takeover and takeover.starts_afresh:
                self.memory.scored_by[[block for block, _ in adopted]] = request.start

    def _write(self, request: WorkerRequest, start: int, end: int) -> None:
        """Compute the tokens ``start`` to ``end``."""
        assert end <= len(request.tokens), "nobody has sampled these"
        exact = request.exact[start:end]
        for group, table in enumerate(request.tables):
            labels = self.memory.unique(end - start) if request.evicted else exact
            for token, label in zip(range(start, end), labels, strict=True):
                position, offset = divmod(token, BLOCK_SIZE)
                assert table[position] != NULL_BLOCK, "written into an evicted block"
                self.memory.labels[table[position], offset] = label
                empty = np.zeros(BLOCK_SIZE, dtype=np.int64)
                request.expected[group].setdefault(position, empty)[offset] = label
                if offset == 0:
                    self.memory.scored_by[table[position]] = request.start

    def _read(self, request: WorkerRequest, start: int, num_tokens: int) -> None:
        """Attention: once all requests have written, each finds in its blocks what it put there.

        A worker's table of a window keeps what the window has passed, which may be another's.
        """
        for group, table in enumerate(request.tables):
            windowed = group not in self._evicting
            first = max(0, start - WINDOW + 1) // BLOCK_SIZE if windowed else 0
            for position, block in enumerate(table[: -(-num_tokens // BLOCK_SIZE)]):
                assert not windowed or position < first or block != NULL_BLOCK, "a hole"
                if block != NULL_BLOCK and position >= first:
                    held = min(BLOCK_SIZE, num_tokens - position * BLOCK_SIZE)
                    request.check(self.memory, group, position, held, not windowed)

    def _sample(self, request: WorkerRequest, num_tokens: int) -> list[int]:
        """A token that follows from those before it; None in the middle of a prompt."""
        if num_tokens < len(request.tokens):
            return []
        request.append([request.exact[-1] % VOCABULARY])
        return request.tokens[-1:]


def engine_config(folder: str, **arguments: Any) -> VllmConfig:
    """Of an engine that shares prefixes and checks conservation at every step."""
    groups = arguments.pop("layer_groups")
    return EngineArgs(
        folder,
        max_model_len=1024,
        max_num_seqs=8,
        max_num_batched_tokens=512,
        long_prefill_token_threshold=64,
        enforce_eager=True,
        skip_tokenizer_init=True,
        dtype="float32",
        **arguments,
        **eviction_engine_args(
            policy="dense",
            check_integrity=True,
            prefix_caching=True,
            layer_groups=groups,
            score_queries="all",
        ),
    ).create_engine_config()


class SchedulerOverMemory:
    """Schedules steps, executes them at once, and tells the scheduler of them: with asynchronous
    scheduling, one step late.

    Args:
        folder: of a model, of which only the configuration is read.
        num_blocks: in the pool, the null block among them.
        num_layer_groups: of one layer each.
        asynchronous: asynchronous scheduling.
        priority: requests are scheduled by priority, not in the order they came.
        window_groups: further KV-cache groups, whose layers have a window; they come first.

    """

    def __init__(
        self,
        folder: str,
        num_blocks: int,
        num_layer_groups: int,
        asynchronous: bool,
        priority: bool,
        window_groups: int = 0,
    ) -> None:
        init_none_hash(sha256)
        config = engine_config(
            folder,
            layer_groups=num_layer_groups,
            scheduling_policy="priority" if priority else "fcfs",
        )
        config.scheduler_config.async_scheduling = asynchronous  # vLLM has none on a CPU
        config.cache_config.num_gpu_blocks = num_blocks
        cache = {
            "block_size": BLOCK_SIZE,
            "num_kv_heads": 2,
            "head_size": 32,
            "dtype": torch.float32,
        }
        windows = [WindowSpec(**cache, sliding_window=WINDOW)] * window_groups
        evicting = [
            EvictableSpec(**cache, layer_group=group, layer_groups=num_layer_groups)
            for group in range(num_layer_groups)
        ]
        groups = [
            KVCacheGroupSpec([f"model.layers.{layer}.self_attn.attn"], spec)
            for layer, spec in enumerate([*windows, *evicting])
        ]
        kv_cache_config = KVCacheConfig(num_blocks, [], groups)
        with set_current_vllm_config(config):
            scheduler_class = AsyncScheduler if asynchronous else Scheduler
            self.scheduler = scheduler_class(
                vllm_config=config,
                kv_cache_config=kv_cache_config,
                structured_output_manager=StructuredOutputManager(config),
                block_size=BLOCK_SIZE,
                hash_block_size=BLOCK_SIZE,
                log_stats=False,
            )
        self.pool = self.scheduler.kv_cache_manager.block_pool
        ledger = self.scheduler.connector.ledger
        self.worker = SimulatedWorker(num_blocks, ledger, list(layer_groups(kv_cache_config)))
        self._most_in_flight = int(asynchronous)
        self._in_flight: deque[tuple[Any, dict[str, list[int]]]] = deque()
        self._idle_steps = 0
        self._requests: list[Request] = []
        self._hashed: dict[bytes, list[int]] = {}
        self._num_hashes: Counter[str] = Counter()
        self._scores = np.random.default_rng(0)

    @property
    def is_busy(self) -> bool:
        """Whether a request or a step is not done."""
        return bool(self.scheduler.requests) or bool(self._in_flight)

    def add(
        self, prompt: Sequence[int], max_tokens: int, settings: dict[str, Any], priority: int
    ) -> None:
        """A request arrives."""
        number = len(self._requests)
        request = Request(
            request_id=f"r{number}",
            prompt_token_ids=list(prompt),
            sampling_params=SamplingParams(
                max_tokens=max_tokens, temperature=0.0, ignore_eos=True, extra_args=settings
            ),
            pooling_params=None,
            block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
            priority=priority,
            arrival_time=float(number),
        )
        self._requests.append(request)
        self.scheduler.add_request(request)

    def abort(self, name: str) -> None:
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def step(self) -> None:
        """One step; then every block that the prefix cache offers holds exactly its tokens.

        Raises:
            AssertionError: that, or what stands with the worker's methods, does not hold; or
                requests wait and nothing is scheduled any more.

        """
        output = self.scheduler.schedule()
        self._in_flight.append((output, self.worker.execute(output)))
        while len(self._in_flight) > self._most_in_flight:
            self._finish_step()
        waits = self.scheduler.requests and not output.total_num_scheduled_tokens
        self._idle_steps = self._idle_steps + 1 if waits else 0
        assert self._idle_steps < MOST_IDLE_STEPS, "requests wait for ever"
        if not self.scheduler.requests:
            while self._in_flight:
                self._finish_step()
        self._check_hashed_blocks()

    def _finish_step(self) -> None:
        output, sampled = self._in_flight.popleft()
        names = list(output.num_scheduled_tokens)
        num_blocks = self.pool.num_gpu_blocks
        scores = {
            name: self._scores.random(num_blocks, dtype=np.float32)
            for name in (ATTENTION, KEY_NORM)
        }
        report = ScoreReport(output.kv_connector_metadata.step, scores)
        self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: i for i, name in enumerate(names)},
                sampled_token_ids=[sampled[name] for name in names],
                kv_connector_output=KVConnectorOutput(kv_connector_worker_meta=report),
            ),
        )

    def _check_hashed_blocks(self) -> None:
        for request in self._requests:
            if len(request.block_hashes) > self._num_hashes[request.request_id]:
                self._note_hashes(request)
        for block in self.pool.blocks:
            if block.block_hash is not None:
                tokens = self._hashed[bytes(get_block_hash(block.block_hash))]
                held = self.worker.memory.labels[block.block_id]
                assert (held == tokens).all(), f"block {block.block_id} is hashed as another"

    def _note_hashes(self, request: Request) -> None:
        """Which labels the blocks of a request's hashes must have."""
        whole = WorkerRequest()
        whole.append(request.all_token_ids)
        for i, block_hash in enumerate(request.block_hashes):
            labels = whole.exact[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE]
            self._hashed[bytes(block_hash)] = labels
        self._num_hashes[request.request_id] = len(request.block_hashes)

    def check_empty(self) -> None:
        """Once all requests have ended, all blocks are free and nobody is remembered."""
        connector = self.scheduler.connector
        connector.check_integrity()
        assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1
        assert not connector.ledger.requests
        assert not connector.ledger.sharing._exact
        for manager in self.scheduler.kv_cache_manager.coordinator.single_type_managers:
            assert not manager.req_to_blocks
            assert not manager.num_cached_block
            if isinstance(manager, EvictableManager):
                assert not manager._unhashed
                assert not manager._taken
