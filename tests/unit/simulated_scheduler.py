"""vLLM's scheduler over a model of the workers' memory.

    vLLM's scheduler, our connector, ledger and managers     as in an engine
        | SchedulerOutput with its EvictionPlan
    ``simulated_worker.SimulatedWorker``                     in the place of the workers

What a block must hold stands in ``simulated_worker.py``; what the prefix cache may offer, here.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
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
from vllm_plugins.manager import EvictableManager
from vllm_plugins.messages import ScoreReport
from vllm_plugins.policies import ATTENTION, KEY_NORM
from vllm_plugins.spec import EvictableSpec, layer_groups
from vllm_plugins.window import WindowSpec

from .simulated_worker import BLOCK_SIZE, WINDOW, SimulatedWorker, WorkerRequest

MOST_IDLE_STEPS = 50


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
