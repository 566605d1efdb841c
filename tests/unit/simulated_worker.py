"""A model of the workers' memory: what stands in every block, and whose.

    SimulatedWorker    ``waves`` and block tables, no tensors
        | labels
    Memory             [num_blocks, block_size]

A label stands for a token's keys and values. Where a token saw the whole cache before it, its label
follows from the tokens up to it, so that equal prefixes have equal labels. Everything else has a
label that occurs once: what saw an evicted cache, and what a pack wrote.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np

from vllm_plugins.attention.compaction import NULL_BLOCK
from vllm_plugins.ledger import Ledger
from vllm_plugins.messages import EvictionPlan
from vllm_plugins.packs import Pack
from vllm_plugins.policies import GRAPH
from vllm_plugins.worker import table_changes, waves

BLOCK_SIZE = 32
WINDOW = 96
VOCABULARY = 7
"""Few tokens: continuations of one prefix often agree for a while."""


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


@dataclass
class Execution:
    """Of one step: its requests' sampled tokens, and the rows of their graphs of blocks."""

    sampled: dict[str, list[int]]
    graph: list[tuple[str, int, int, np.ndarray, np.ndarray]]


class SimulatedWorker:
    """Does with labels what ``EvictionWorkerMixin`` and a model runner do with tensors.

    Args:
        num_blocks: in the pool.
        ledger: of the scheduler.
        evicting: the KV-cache groups that evict, in order; the others have a window.

    Attributes:
        counts: what the plans asked for, by kind.
        sampled: all tokens that were sampled for a request.

    """

    def __init__(self, num_blocks: int, ledger: Ledger, evicting: Sequence[int]) -> None:
        self.memory = Memory(num_blocks)
        self.requests: dict[str, WorkerRequest] = {}
        self.counts: Counter[str] = Counter()
        self.sampled: defaultdict[str, list[int]] = defaultdict(list)
        self._ledger, self._evicting = ledger, evicting
        self._starts = count(1)

    def execute(self, output: Any) -> Execution:
        """One step."""
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
        graph = [
            row for name, end in ends.items() for row in self._graph(name, computed[name], end)
        ]
        sampled = {name: self._sample(self.requests[name], end) for name, end in ends.items()}
        for name, tokens in sampled.items():
            self.sampled[name] += tokens
        return Execution(sampled, graph)

    def _graph(
        self, name: str, start: int, end: int
    ) -> Iterator[tuple[str, int, int, np.ndarray, np.ndarray]]:
        """What the blocks of the tokens ``start`` to ``end`` gave to those up to them."""
        if GRAPH not in self._ledger.requests[name].settings.needs:
            return
        for group, kv_cache_group in enumerate(self._evicting):
            table = self.requests[name].tables[kv_cache_group]
            for position in range(start // BLOCK_SIZE, -(-end // BLOCK_SIZE)):
                keys = np.array([block for block in table[: position + 1] if block != NULL_BLOCK])
                yield name, group, table[position], keys, np.ones(len(keys), dtype=np.float32)

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
