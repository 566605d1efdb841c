"""The CUDA worker. (``worker_cpu.py`` must never be imported beside it.)"""

from __future__ import annotations

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.gpu_worker import Worker

from .attention.state_cuda import CudaState
from .worker import EvictionWorkerMixin


class EvictionCUDAWorker(EvictionWorkerMixin, Worker):
    """``Worker`` with eviction."""

    state_class = CudaState

    @staticmethod
    def register_attention() -> None:
        """Fill the place that vLLM keeps for a third party's backend."""
        register_backend(
            AttentionBackendEnum.CUSTOM, "vllm_plugins.attention.cuda.EvictionCUDABackend"
        )
