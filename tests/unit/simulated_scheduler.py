"""vLLM's scheduler over a model of the workers' memory.

    vLLM's scheduler, our connector, ledger and managers     as in an engine
        | SchedulerOutput with its EvictionPlan
    ``simulated_worker.SimulatedWorker``                     in the place of the workers

What a block must hold stands in ``simulated_worker.py``, what the prefix cache may offer and who
must be answered, here, and what else holds after every step in ``scheduling_invariants.py``.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import isclose
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
from vllm_plugins.messages import ScoreReport
from vllm_plugins.metrics import COUNTERS, LIVE_SHARE
from vllm_plugins.policies import ATTENTION, KEY_NORM
from vllm_plugins.spec import EvictableSpec, layer_groups
from vllm_plugins.window import WindowSpec

from .scheduling_invariants import check_at_rest, check_blocks, check_plan
from .simulated_worker import BLOCK_SIZE, WINDOW, Execution, SimulatedWorker, WorkerRequest

MOST_IDLE_STEPS = 50
CHUNK = 64
"""Tokens of a prompt that are computed in a step."""
REPORTS = ("prompt", "late", "lost")
"""Of each step's scores: with its output, with the next one's, or never."""


@lru_cache
def engine_config(folder: str, **arguments: Any) -> VllmConfig:
    """Of an engine that shares prefixes and checks conservation at every step."""
    groups = arguments.pop("layer_groups")
    return EngineArgs(
        folder,
        max_model_len=1024,
        max_num_seqs=8,
        max_num_batched_tokens=512,
        long_prefill_token_threshold=CHUNK,
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


@dataclass
class Arrival:
    """A request, and what became of it.

    Attributes:
        request: vLLM's.
        aborted: nobody waits for an answer.
        answer: tokens that came back.
        record: of the plug-in, with the last of them.

    """

    request: Request
    aborted: bool = False
    answer: list[int] = field(default_factory=list)
    record: dict[str, Any] | None = None

    @property
    def most_steps(self) -> int:
        """Steps that it takes at most, alone: what was computed may have to be computed again."""
        tokens = self.request.num_prompt_tokens + self.request.max_tokens
        return tokens // CHUNK + 2 + self.request.max_tokens


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

    Attributes:
        reports: one of ``REPORTS``, which may change at any time.
        processed, scored: of each start of a request, known by its preemptions: the tokens that no
            step in flight will compute, and those that the delivered scores include.
        sound: nothing was wrong so far.
        starting: requests whose blocks begin anew with the last step.
        statistics: sums of what the connector told.

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
                log_stats=True,
            )
        self.pool = self.scheduler.kv_cache_manager.block_pool
        ledger = self.scheduler.connector.ledger
        self.worker = SimulatedWorker(num_blocks, ledger, list(layer_groups(kv_cache_config)))
        self.arrivals: dict[str, Arrival] = {}
        self.reports = REPORTS[0]
        self.processed: dict[tuple[str, int], int] = {}
        self.scored: dict[tuple[str, int], int] = {}
        self.sound = True
        self.starting: set[str] = set()
        self.statistics: Counter[str] = Counter()
        self._most_in_flight = int(asynchronous)
        self._in_flight: deque[tuple[Any, Execution, dict[tuple[str, int], int]]] = deque()
        self._unreported: deque[tuple[int, dict[tuple[str, int], int]]] = deque()
        self._late: ScoreReport | None = None
        self._idle_steps = 0
        self._hashed: dict[bytes, np.ndarray] = {}
        self._num_hashes: Counter[str] = Counter()
        self._scores = np.random.default_rng(0)

    @property
    def managers(self) -> list[Any]:
        """Of all KV-cache groups, in vLLM's order."""
        return list(self.scheduler.kv_cache_manager.coordinator.single_type_managers)

    @property
    def is_busy(self) -> bool:
        """Whether a request or a step is not done."""
        return bool(self.scheduler.requests) or bool(self._in_flight)

    def add(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        settings: dict[str, Any],
        priority: int,
        stop: int | None = None,
    ) -> None:
        """A request arrives. ``stop``: the token that ends its answer."""
        number = len(self.arrivals)
        request = Request(
            request_id=f"r{number}",
            prompt_token_ids=list(prompt),
            sampling_params=SamplingParams(
                max_tokens=max_tokens,
                temperature=0.0,
                ignore_eos=True,
                stop_token_ids=None if stop is None else [stop],
                extra_args=settings,
            ),
            pooling_params=None,
            block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
            priority=priority,
            arrival_time=float(number),
        )
        self.arrivals[request.request_id] = Arrival(request)
        self.scheduler.add_request(request)

    def abort(self, name: str) -> None:
        self.arrivals[name].aborted = True
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def reset_prefix_cache(self, everybody: bool) -> bool:
        """Clear the cache, which vLLM does with no step in flight. ``everybody``: who runs starts
        again; else it is cleared only if nobody does."""
        self.finish_steps()
        return self.scheduler.reset_prefix_cache(reset_running_requests=everybody)

    def step(self) -> None:
        """One step; then every block that the prefix cache offers holds exactly its tokens.

        Raises:
            AssertionError: that, or what stands with the worker's methods or in
                ``scheduling_invariants.py``, does not hold; or requests wait and nothing is
                scheduled any more.

        """
        self.sound = False
        output = self.scheduler.schedule()
        ends = self._note_schedule(output)
        check_plan(self, output)
        self._in_flight.append((output, self.worker.execute(output), ends))
        while len(self._in_flight) > self._most_in_flight:
            self._finish_step()
        waits = self.scheduler.requests and not output.total_num_scheduled_tokens
        self._idle_steps = self._idle_steps + 1 if waits else 0
        assert self._idle_steps < MOST_IDLE_STEPS, "requests wait for ever"
        if not self.scheduler.requests:
            self.finish_steps()
        self.check()

    def check(self) -> None:
        """What holds at any time between two steps."""
        self.sound = False
        self.scheduler.connector.check_integrity()
        check_blocks(self)
        self._check_hashed_blocks()
        self.sound = True

    def drain(self) -> None:
        """Until nobody is left, which takes no more steps than all requests one after the other,
        twice."""
        live = [a for name, a in self.arrivals.items() if name in self.scheduler.requests]
        most = MOST_IDLE_STEPS + 2 * sum(arrival.most_steps for arrival in live)
        for _ in range(most):
            if not self.is_busy:
                break
            self.step()
        assert not self.is_busy, f"{len(self.scheduler.requests)} of {len(live)} wait for ever"

    def finish_steps(self) -> None:
        """Let the workers end what is in flight."""
        while self._in_flight:
            self._finish_step()

    def _note_schedule(self, output: Any) -> dict[tuple[str, int], int]:
        """The tokens that each request of a step will have, by its start."""
        ends = {}
        self.starting = set()
        for name, number in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[name]
            life, end = (name, request.num_preemptions), request.num_computed_tokens
            if life not in self.processed:
                self.processed[life] = end - number  # from the prefix cache
                self.starting.add(name)
            ends[life] = end
        return ends

    def _finish_step(self) -> None:
        output, execution, ends = self._in_flight.popleft()
        names = list(output.num_scheduled_tokens)
        report = self._report(output.kv_connector_metadata.step, execution, ends)
        if report is not None:
            while self._unreported and self._unreported[0][0] <= report.step:
                self.scored.update(self._unreported.popleft()[1])
        outputs = self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: i for i, name in enumerate(names)},
                sampled_token_ids=[execution.sampled[name] for name in names],
                kv_connector_output=KVConnectorOutput(kv_connector_worker_meta=report),
            ),
        )
        self.processed.update(ends)
        for made in outputs.values():
            for answer in made.outputs:
                self._take_answer(answer)
            if made.scheduler_stats is not None:
                self._take_statistics(made.scheduler_stats.kv_connector_stats)

    def _report(
        self, step: int, execution: Execution, ends: dict[tuple[str, int], int]
    ) -> ScoreReport | None:
        """What reaches the scheduler with a step's output."""
        num_blocks = self.pool.num_gpu_blocks
        scores = {
            name: self._scores.random(num_blocks, dtype=np.float32)
            for name in (ATTENTION, KEY_NORM)
        }
        report = ScoreReport(step, scores, execution.graph)
        self._unreported.append((step, ends))
        self.worker.counts[f"{self.reports} reports"] += 1
        late, self._late = self._late, None
        if self.reports == "late":
            self._late = report
            return late
        return report if self.reports == "prompt" else None

    def _take_answer(self, output: Any) -> None:
        arrival = self.arrivals[output.request_id]
        assert not arrival.aborted, "an answer to nobody"
        assert arrival.record is None, "an answer after the last one"
        arrival.answer += output.new_token_ids
        if output.finish_reason is not None:
            arrival.record = output.kv_transfer_params["kv_eviction"]

    def _take_statistics(self, stats: dict[str, Any] | None) -> None:
        """Counters are told once each; the share is one."""
        if stats is not None:
            told = {name: stats.get(name, 0) for name in COUNTERS}
            assert min(told.values()) >= 0
            self.statistics.update(told)
            assert stats[LIVE_SHARE] is None or 0.0 <= stats[LIVE_SHARE] <= 1.0
        totals = self.scheduler.connector.ledger.totals
        for name in COUNTERS:
            assert isclose(self.statistics[name], totals[name], abs_tol=1e-9), (
                f"{name} is told otherwise"
            )

    def _check_hashed_blocks(self) -> None:
        for request in (arrival.request for arrival in self.arrivals.values()):
            if len(request.block_hashes) > self._num_hashes[request.request_id]:
                self._note_hashes(request)
        hashed = [block for block in self.pool.blocks if block.block_hash is not None]
        if not hashed:
            return
        expected = [self._hashed[bytes(get_block_hash(block.block_hash))] for block in hashed]
        ids = np.array([block.block_id for block in hashed])
        wrong = ids[(self.worker.memory.labels[ids] != np.stack(expected)).any(axis=1)]
        assert not len(wrong), f"block {wrong[0]} is hashed as another"

    def _note_hashes(self, request: Request) -> None:
        """Which labels the blocks of a request's hashes must have."""
        whole = WorkerRequest()
        whole.append(request.all_token_ids)
        for i, block_hash in enumerate(request.block_hashes):
            labels = whole.exact[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE]
            self._hashed[bytes(block_hash)] = np.array(labels)
        self._num_hashes[request.request_id] = len(request.block_hashes)

    def check_answers(self) -> None:
        """Everybody who was not aborted has the tokens asked for, as they were sampled."""
        for name, arrival in self.arrivals.items():
            request, sampled = arrival.request, self.worker.sampled[name]
            assert arrival.answer == sampled[: len(arrival.answer)], f"{name}: other tokens"
            if arrival.aborted:
                continue
            assert arrival.record is not None, f"{name} has no answer"
            stops = request.sampling_params.stop_token_ids or []
            stopped = [token in stops for token in arrival.answer]
            assert not any(stopped[:-1]), f"{name} goes on after its end"
            assert stopped[-1] or len(stopped) == request.max_tokens, f"{name}: a part of an answer"

    def check_empty(self) -> None:
        """Once all requests have ended, all blocks are free and nobody is remembered."""
        self.check_answers()
        check_at_rest(self)
