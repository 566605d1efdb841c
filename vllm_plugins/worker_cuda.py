"""The CUDA worker and its model runner. (``worker_cpu.py`` must never be imported beside it.)"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from .attention.state import worker_state
from .attention.state_cuda import CudaState
from .worker import EvictionWorkerMixin, evictable


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
        super().initialize_kv_cache(kv_cache_config, is_profiling, kv_cache_allocation_context)
        if is_profiling:
            worker_state().allocate(kv_cache_config.num_blocks, self.device)


class EvictionCUDAWorker(EvictionWorkerMixin, Worker):
    """``Worker`` with eviction."""

    state_class = CudaState

    @staticmethod
    def register_attention() -> None:
        """Fill the place that vLLM keeps for a third party's backend."""
        register_backend(
            AttentionBackendEnum.CUSTOM, "vllm_plugins.attention.cuda.EvictionCUDABackend"
        )

    def _make_model_runner(self) -> GPUModelRunner:
        """Where vLLM lets a subclass name its runner. V1 is refused (``refusals/engine.py``)."""
        return EvictionModelRunner(self.vllm_config, self.device)
