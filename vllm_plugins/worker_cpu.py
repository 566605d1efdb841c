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

from .attention.compaction import NULL_BLOCK
from .attention.packing_cpu import CPUPacker
from .attention.state_cpu import CPUWorkerState
from .packs import Pack
from .worker import Evicted, EvictionWorkerMixin, Replaced, evictable


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

    def apply_evictions(self, evicted: Evicted, replaced: Replaced) -> None:
        """Write nulls and replacements into the tables of requests that the runner knows.

        Both the cached state of a request (which refills a row that left the batch) and the row
        itself are written; the row reaches the attention metadata in this same step.
        """
        self.eviction.row_ids = self.model_runner.input_batch.req_ids
        for request_id, nulled in evicted.items():
            for group, positions in nulled.items():
                self._write(request_id, group, dict.fromkeys(positions, NULL_BLOCK))
        for request_id, changed in replaced.items():
            for group, blocks in changed.items():
                self._write(request_id, group, blocks)

    def _write(self, request_id: str, group: int, entries: Mapping[int, int]) -> None:
        runner = self.model_runner
        if (request := runner.requests.get(request_id)) is None:
            return
        for position, block in entries.items():
            request.block_ids[group][position] = block
        row = runner.input_batch.req_id_to_index.get(request_id)
        if row is not None:
            table = runner.input_batch.block_table[group].block_table.np
            table[row, list(entries)] = list(entries.values())
