"""The CUDA worker, over vLLM's V2 model runner. (Never import ``worker_cpu.py`` beside it.)

Private state of vLLM 0.32.0 that is touched here: ``runner.req_states.req_id_to_index``,
``runner.block_tables.block_tables[group].stage_write``, and the worker's
``_make_model_runner`` and ``_maybe_activate_jit_monitor``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from .attention.packing_cuda import CUDAPacker
from .attention.quantised_cache import Scales
from .attention.state import worker_state
from .attention.state_cuda import CUDAWorkerState
from .attention.token_scores import UNWRITTEN
from .kernels.choose import WARM_UP_TOKENS
from .packs import Pack
from .spec import layer_groups
from .worker import Changes, EvictionWorkerMixin, evictable


class EvictionModelRunner(GPUModelRunner):
    """vLLM's V2 runner with evictable specs wherever they are asked for.

    The worker asks for them, and so does the runner itself, while vLLM measures how much memory
    its CUDA graphs will take (``profile_cudagraph_memory`` in
    ``vllm/v1/worker/gpu/cudagraph_utils.py``): what is measured must be what will run.
    """

    def get_kv_cache_spec(self) -> dict[str, Any]:
        """Specs by layer, evictable and split into layer groups."""
        return evictable(super().get_kv_cache_spec(), self.max_model_len)

    def initialize_kv_cache(
        self,
        kv_cache_config: Any,
        is_profiling: bool = False,
        kv_cache_allocation_context: AbstractContextManager | None = None,
    ) -> None:
        """As vLLM's; the throw-away cache of a measurement gets scores too.

        No connector exists then that would allocate them (``register_kv_caches``), and graphs
        captured without scores would look smaller than they are.
        """
        state = worker_state()
        if is_profiling:
            state.set_layers(layer_groups(kv_cache_config))
        super().initialize_kv_cache(kv_cache_config, is_profiling, kv_cache_allocation_context)
        if is_profiling:
            layers = self.compilation_config.static_forward_context
            state.allocate({name: layers[name].kv_cache for name in state.group_of})


class EvictionCUDAWorker(EvictionWorkerMixin, Worker):
    """``Worker`` with eviction."""

    state_class = CUDAWorkerState
    eviction: CUDAWorkerState

    @staticmethod
    def register_attention() -> None:
        """Fill the place that vLLM keeps for a third party's backend."""
        register_backend(
            AttentionBackendEnum.CUSTOM, "vllm_plugins.attention.cuda.EvictionCUDABackend"
        )

    def _make_model_runner(self) -> GPUModelRunner:
        """Where vLLM lets a subclass name its runner. V1 is refused (``refusals/engine.py``)."""
        return EvictionModelRunner(self.vllm_config, self.device)

    def new_packer(self) -> CUDAPacker:
        """For FlashAttention's caches."""
        layers = self.vllm_config.compilation_config.static_forward_context
        scales = {name: Scales.of(layers[name]) for name in self.eviction.group_of}
        return CUDAPacker(**self.packer_arguments(), scales=scales)

    def _maybe_activate_jit_monitor(self) -> None:
        """The end of vLLM's warm-up: what is compiled from now on makes a request wait.

        The scoring kernels ran in vLLM's made-up steps (``CUDAWorkerState.warming_up``), those that
        pack run here.
        """
        self._warm_up_packing()
        self.eviction.warming_up = False
        super()._maybe_activate_jit_monitor()

    def _warm_up_packing(self) -> None:
        """Pack made-up requests under the rule of every policy that requests may ask for.

        Nobody holds a block yet, so what moves in them is nobody's. Parameters of a request's own
        may need other kernels, which are compiled when it comes.
        """
        position = self.eviction.tokens.position
        _, num_blocks, _, block_size = position.shape
        places = torch.arange(num_blocks * block_size, dtype=torch.int32, device=position.device)
        position.copy_(places.view(1, num_blocks, 1, block_size))  # no two alike, as in a request
        for settings in self.eviction.config.token_settings():
            for most in WARM_UP_TOKENS:
                blocks = min(most // block_size, num_blocks - 1)
                if blocks > 1:
                    pack = Pack(
                        group=0,
                        block_ids=list(range(1, blocks + 1)),
                        num_kept_blocks=blocks // 2,
                        budget_blocks=blocks // 2 + 1,
                        num_tokens=blocks * block_size,
                        seed=0,
                        policy=settings.policy,
                        policy_args=settings.policy_args,
                    )
                    self.pack({"": [pack]})
        position.fill_(UNWRITTEN)
        self.eviction.pack_failures.clear()

    def change_tables(self, changes: Changes) -> None:
        """Stage the entries; the runner writes them with the step's new blocks, in this order.

        A request that the runner does not know yet (it comes, or comes back, in this very step)
        brings a table in which its entries are changed already.
        """
        runner = self.model_runner
        self.eviction.row_of = runner.req_states.req_id_to_index
        for request_id, groups in changes.items():
            row = runner.req_states.req_id_to_index.get(request_id)
            if row is None:
                continue
            for group, blocks in groups.items():
                table = runner.block_tables.block_tables[group]
                for start, length in ranges(sorted(blocks)):
                    table.stage_write(row, start, [blocks[start + i] for i in range(length)])


def ranges(positions: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending ``positions`` as (start, length) of runs without a gap."""
    start = previous = positions[0]
    for position in positions[1:]:
        if position != previous + 1:
            yield start, previous + 1 - start
            start = position
        previous = position
    yield start, previous + 1 - start
