"""The CPU worker. Never import this on a CUDA machine: vLLM's CPU worker module replaces
``torch.cuda.Event`` for the whole process."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.cpu_worker import CPUWorker

from .worker import EvictionWorkerMixin, evictable


class EvictionCPUWorker(EvictionWorkerMixin, CPUWorker):
    """``CPUWorker`` with eviction."""

    @staticmethod
    def register_attention() -> None:
        """Override ``CPU_ATTN``: the platform refuses ``CUSTOM``, but honours an override."""
        register_backend(
            AttentionBackendEnum.CPU_ATTN, "vllm_plugins.attention.cpu.EvictionCPUBackend"
        )

    def get_kv_cache_spec(self) -> dict[str, Any]:
        """Specs by layer, evictable and split into layer groups."""
        return evictable(super().get_kv_cache_spec(), self.model_config.max_model_len)
