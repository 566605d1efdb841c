"""The CPU worker, over vLLM's V1 model runner. Never import this on a CUDA machine: vLLM's CPU
worker module replaces ``torch.cuda.Event`` for the whole process.

Private state of vLLM 0.32.0 that is touched here: ``runner.requests[id].block_ids``,
``runner.input_batch.req_id_to_index``, ``.req_ids`` and ``.block_table[group].block_table.np``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.cpu_worker import CPUWorker

from .attention.packing_cpu import CPUPacker
from .attention.state_cpu import CPUWorkerState
from .packs import Pack
from .worker import Changes, EvictionWorkerMixin, evictable


class EvictionCPUWorker(EvictionWorkerMixin, CPUWorker):
    """``CPUWorker`` with eviction."""

    state_class = CPUWorkerState
    eviction: CPUWorkerState

    @staticmethod
    def register_attention() -> None:
        """Override ``CPU_ATTN``: the platform refuses ``CUSTOM``, but honours an override."""
        register_backend(
            AttentionBackendEnum.CPU_ATTN, "vllm_plugins.attention.cpu.EvictionCPUBackend"
        )

    def get_kv_cache_spec(self) -> dict[str, Any]:
        """Specs by layer, evictable and split into layer groups."""
        return evictable(super().get_kv_cache_spec(), self.model_config.max_model_len)

    def pack(self, packs: Mapping[str, Sequence[Pack]]) -> None:
        """As everywhere; its time is part of the report."""
        if packs:
            with self.eviction.timed("packing"):
                super().pack(packs)

    def new_packer(self) -> CPUPacker:
        """For the layout of this processor's instruction set."""
        name, cache = next(iter(self.eviction.kv_caches.items()))
        layer = self.vllm_config.compilation_config.static_forward_context[name]
        return CPUPacker(layer.impl.layout(layer, cache), **self.packer_arguments())

    def change_tables(self, changes: Changes) -> None:
        """Write the entries into the tables of requests that the runner knows.

        Both the cached state of a request (which refills a row that left the batch) and the row
        itself are written; the row reaches the attention metadata in this same step.
        """
        runner = self.model_runner
        self.eviction.row_ids = runner.input_batch.req_ids
        for request_id, groups in changes.items():
            request = runner.requests.get(request_id)
            if request is None:
                continue
            row = runner.input_batch.req_id_to_index.get(request_id)
            for group, blocks in groups.items():
                for position, block in blocks.items():
                    request.block_ids[group][position] = block
                if row is not None:
                    table = runner.input_batch.block_table[group].block_table.np
                    table[row, list(blocks)] = list(blocks.values())
