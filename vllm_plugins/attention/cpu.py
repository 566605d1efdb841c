"""The CPU backend: vLLM's own attention, on compacted block tables, with block scores.

Seams of ``vllm/v1/attention/backends/cpu_attn.py``: the builder's ``build``, the impl's
``do_kv_cache_update`` (sees every key and value written) and ``forward`` (sees every query).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from ..config import EvictionConfigError
from ..policies import ATTENTION, GRAPH, KEY_NORM
from .block_mass import block_mass
from .compaction import compact_metadata
from .state import attention_state, builder_state
from .state_cpu import CPUWorkerState


@dataclass
class ScoredRow:
    """One request of the batch whose queries are scored.

    ``block_ids``: int64 ``[n]``, live blocks in order; the queries are tokens ``start`` to
    ``stop`` of the batch, the last of ``seq_len`` (compacted) tokens, of ``num_tokens`` that
    the request has in the batch. ``start == stop`` where this step's query is not sampled;
    a sampled one stands for ``weight`` queries.
    """

    request_id: str
    graph: bool
    num_tokens: int
    start: int
    stop: int
    seq_len: int
    weight: int
    block_ids: torch.Tensor


@dataclass
class EvictionMetadata(CPUAttentionMetadata):
    """vLLM's metadata, and the rows to score."""

    rows: tuple[ScoredRow, ...] = ()


class EvictionMetadataBuilder(CPUAttentionMetadataBuilder):
    """Compacts before it builds. Without eviction configured, vLLM's builder."""

    def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._state = builder_state(vllm_config, CPUWorkerState)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        """``CPUAttentionMetadata`` over live blocks only."""
        if self._state is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        compacted = compact_metadata(common_attn_metadata, self.block_size)
        built = super().build(common_prefix_len, compacted, fast_build)
        rows: tuple[ScoredRow, ...] = ()
        if self._state.active:
            rows = tuple(self._rows(built, common_attn_metadata.seq_lens.tolist(), self._state))
        return EvictionMetadata(**vars(built), rows=rows)

    def _rows(
        self, built: CPUAttentionMetadata, num_tokens: list[int], state: CPUWorkerState
    ) -> Iterator[ScoredRow]:
        starts = built.query_start_loc.tolist()
        seq_lens = built.seq_lens.tolist()
        # Rows of the batch are the runner's rows, in order (V1 runner).
        for i, request_id in enumerate(state.row_ids[: len(seq_lens)]):
            needs = state.needs.get(request_id, frozenset())
            stop, seq_len = starts[i + 1], seq_lens[i]
            if not needs & {ATTENTION, GRAPH} or stop == starts[i]:
                continue
            start = starts[i] if state.window is None else max(starts[i], stop - state.window)
            weight = 1
            if stop - starts[i] == 1:
                weight = state.config.score_query_stride
                if not state.scores_query_at(num_tokens[i] - 1):
                    start = stop
            num_blocks = -(-seq_len // self.block_size)
            block_ids = built.block_table[i, :num_blocks].long()
            yield ScoredRow(
                request_id,
                GRAPH in needs,
                stop - starts[i],
                start,
                stop,
                seq_len,
                weight,
                block_ids,
            )


class EvictionImpl(CPUAttentionBackendImpl):
    """Attends as vLLM does, then scores. Without eviction configured, vLLM's implementation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._state = attention_state(self, CPUWorkerState)
        self._key_order: torch.Tensor | None = None

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        state = self._state
        if state is None or not state.active:
            return
        block_size = kv_cache.shape[2]
        written = slot_mapping >= 0
        slots = slot_mapping[written]
        if layer.layer_name in state.first_layers:
            # The first token of a block starts its scores afresh: a reused block must not
            # inherit its former owner's. Later layers of the group only add.
            fresh = slots[slots % block_size == 0].div(block_size, rounding_mode="floor")
            state.mass[fresh] = state.num_queries[fresh] = state.norm[fresh] = 0.0
        if state.wants(KEY_NORM):
            with state.timed("key_norm"):
                n = len(slot_mapping)
                ratio = value[:n].float().norm(dim=-1) / key[:n].float().norm(dim=-1).clamp(1e-6)
                per_token = ratio.sum(-1)[written] / block_size
                state.norm.index_add_(0, slots.div(block_size, rounding_mode="floor"), per_token)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        attended = super().forward(
            layer,
            query,
            key,
            value,
            kv_cache,
            attn_metadata,
            output,
            output_scale,
            output_block_scale,
        )
        rows = getattr(attn_metadata, "rows", ())
        state = self._state
        if state is not None and rows:
            if layer.layer_name in state.first_layers and state.decay != 1.0:
                for row in rows:
                    # Older attention ages by the tokens of this step, scored or not.
                    state.mass[row.block_ids] *= state.decay**row.num_tokens
            if layer.layer_name in state.scored_layers:
                for row in rows:
                    if row.stop > row.start:
                        self._score(state, layer, query, kv_cache, row)
        return attended

    def _score(
        self,
        state: CPUWorkerState,
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        row: ScoredRow,
    ) -> None:
        block_size = kv_cache.shape[2]
        with state.timed("gather_keys"):
            keys = self._keys(layer, kv_cache, row.block_ids)
        with state.timed("block_mass"):
            num_queries = row.stop - row.start
            query_blocks = None
            if row.graph:
                places = torch.arange(row.seq_len - num_queries, row.seq_len)
                query_blocks = places.div(block_size, rounding_mode="floor")
                query_blocks -= int(query_blocks[0])
            mass = block_mass(
                query[row.start : row.stop],
                keys,
                seq_len=row.seq_len,
                block_size=block_size,
                scale=self.scale,
                soft_cap=self.logits_soft_cap,
                decay=state.decay,
                query_blocks=query_blocks,
            )
            mass *= row.weight
        with state.timed("accumulate"):
            if row.graph:
                group = state.group_of[layer.layer_name]
                state.add_graph_rows(row.request_id, group, row.block_ids, mass)
                mass = mass.sum(0)
            if layer.layer_name in state.first_layers:
                first = torch.arange(len(row.block_ids)) * block_size
                seen = (row.seq_len - first).clamp(max=num_queries)
                state.num_queries.index_add_(0, row.block_ids, row.weight * seen.float())
            state.mass.index_add_(0, row.block_ids, mass)

    def _keys(self, layer: Any, kv_cache: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
        """Keys of the blocks in plain order, ``[num_kv_heads, n * block_size, head_size]``."""
        num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
        if self._key_order is None:
            self._key_order = key_order(kv_cache, layer.isa, layer, self.kv_cache_dtype)
        half = kv_cache.view(num_blocks, num_kv_heads, 2, -1)[:, :, 0]
        plain = half.index_select(0, block_ids).index_select(2, self._key_order)
        plain = plain.view(len(block_ids), num_kv_heads, block_size, self.head_size)
        return plain.transpose(0, 1).reshape(num_kv_heads, -1, self.head_size)


def key_order(kv_cache: torch.Tensor, isa: str, layer: Any, kv_cache_dtype: str) -> torch.Tensor:
    """Where vLLM puts key element (token, dim) of a block: int64 ``[block_size * head_size]``.

    The CPU kernels transpose and pack keys differently by instruction set. Rather than repeat
    each layout, write keys that spell their own index through vLLM's kernel into a one-block
    cache and read where they landed. Digits of base 128 are exact in every KV data type.
    """
    _, num_kv_heads, block_size, width = kv_cache.shape
    head_size = width // 2
    size = block_size * head_size
    index = torch.arange(size)
    landed = torch.zeros(size, dtype=torch.int64)
    slots = torch.arange(block_size)
    for digit in range(3):
        values = (index // 128**digit % 128).to(kv_cache.dtype)
        key = values.view(block_size, 1, head_size).expand(-1, num_kv_heads, -1).contiguous()
        scratch = torch.zeros(1, num_kv_heads, block_size * 2, head_size, dtype=kv_cache.dtype)
        key_half, value_half = scratch.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            key,
            key,
            key_half,
            value_half,
            slots,
            isa,
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
            kv_cache_dtype=kv_cache_dtype,
        )
        landed += key_half[0, 0].reshape(-1).float().round().long() * 128**digit
    order = torch.empty_like(landed)
    order[landed] = index
    if not torch.equal(landed[order], index):
        raise EvictionConfigError(
            f"keys of head size {head_size} are stored in a form that cannot be read back "
            f"(instruction set {isa!r}); use another dtype or block size"
        )
    return order


class EvictionCPUBackend(CPUAttentionBackend):
    """Takes the place of ``CPU_ATTN`` in workers of an engine with eviction."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return EvictionImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return EvictionMetadataBuilder
