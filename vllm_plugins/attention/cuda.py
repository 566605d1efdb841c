"""The CUDA backend: vLLM's FlashAttention on compacted block tables, with block scores.

Seams of ``vllm/v1/attention/backends/flash_attn.py``: the builder's ``build``, the impl's
``do_kv_cache_update`` and ``forward``. Under full CUDA graphs the kernels of a step are those of
the capture, so all that changes between steps lies in buffers that live as long as the engine:
compacted tables and lengths (one pair a layer group), and one flag a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from ..config import SCORED_IN_FULL
from ..kernels import NEEDED, TOKENS_NEEDED, TOKENS_SCORED
from ..kernels.attention_mass import Queries
from ..kernels.block_mass import add_block_mass
from ..kernels.block_scores import add_key_norms, age_blocks, start_blocks
from ..kernels.compact import compact_block_table
from ..kernels.token_mass import add_token_mass, start_tokens
from ..policies import ATTENTION, KEY_NORM, TOKEN_MASS
from ..request_settings import BLOCK
from ..spec import EvictableSpec
from .quantised_cache import Scales, numbers
from .state import attention_state, builder_state
from .state_cuda import CUDAWorkerState


@dataclass
class EvictionMetadata(FlashAttentionMetadata):
    """vLLM's metadata, and what is scored.

    ``block_scores``, ``token_scores``: whether this step's forward scores blocks, and tokens
    (always in a warm-up and when a graph is captured, if some request may need it).
    ``num_decode_rows``: rows before this one have at most one query, later ones may have more.
    ``max_live_tokens``: no row attends to more.
    """

    block_scores: bool = False
    token_scores: bool = False
    num_decode_rows: int = 0
    max_live_tokens: int = 0


class EvictionMetadataBuilder(FlashAttentionMetadataBuilder):
    """Compacts before it builds. Of layers that do not evict, vLLM's builder."""

    supports_update_block_table = False  # a table that somebody else puts in is not compacted

    def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        state = builder_state(vllm_config, CUDAWorkerState)
        self._state = state if isinstance(kv_cache_spec, EvictableSpec) else None
        if self._state is not None:
            scheduler = vllm_config.scheduler_config
            self._max_rows = max(scheduler.max_num_seqs, self.max_cudagraph_size or 0)
            self._state.allocate_rows(self._max_rows, device)
            self._group = self._state.group_of[layer_names[0]]
            self._lens = torch.zeros(self._max_rows, dtype=torch.int32, device=device)
            self._table: torch.Tensor | None = None

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> FlashAttentionMetadata:
        """``FlashAttentionMetadata`` over live blocks only."""
        if self._state is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        return self._build(self._state, common_attn_metadata, fast_build, capture=False)

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> FlashAttentionMetadata:
        """The same, for a graph that has to serve every later step."""
        if self._state is None:
            return super().build_for_cudagraph_capture(common_attn_metadata)
        return self._build(self._state, common_attn_metadata, False, capture=True)

    def _build(
        self, state: CUDAWorkerState, common: Any, fast_build: bool, capture: bool
    ) -> EvictionMetadata:
        num_rows = common.num_reqs
        if self._table is None:  # its width is not known before; first called in a warm-up
            width = common.block_table_tensor.shape[1]
            self._table = torch.zeros(
                self._max_rows, width, dtype=torch.int32, device=self._lens.device
            )
        table, lens = self._table[:num_rows], self._lens[:num_rows]
        compact_block_table(
            common.block_table_tensor, common.seq_lens, self.block_size, table, lens
        )
        starts = common.query_start_loc_cpu.numpy()
        query_lens = starts[1 : num_rows + 1] - starts[:num_rows]
        seq_lens = common.seq_lens_cpu_upper_bound.numpy()[:num_rows]
        req_idx = None if capture else common.req_idx
        rows = state.rows(req_idx, num_rows, query_lens, seq_lens)
        max_live = common.max_seq_len
        if not capture:
            live = seq_lens - rows.evicted[self._group] * self.block_size
            max_live = int(live.max(initial=1))
        built = super().build(
            0,
            common.replace(block_table_tensor=table, seq_lens=lens, max_seq_len=max_live),
            fast_build,
        )
        chunks = (query_lens > 1).nonzero()[0]
        flags = int(np.bitwise_or.reduce(rows.flags, initial=0))
        # A launch that nobody needs is harmless: rows without a flag are skipped.
        every = capture or state.warming_up
        warms_up = state.warming_up and not capture and state.tokens.position.numel() > 0
        if warms_up or flags & TOKENS_NEEDED:
            start_tokens(
                common.slot_mapping,
                common.query_start_loc,
                common.seq_lens,
                state.flags,
                state.tokens.position,
                state.tokens.mass,
                state.tokens.peak,
                int(query_lens.max(initial=1)),
            )
        return EvictionMetadata(
            **vars(built),
            block_scores=state.allocated
            and ATTENTION in state.channels
            and (every or bool(flags & NEEDED)),
            token_scores=state.allocated
            and TOKEN_MASS in state.server_needs
            and (every or bool(flags & TOKENS_SCORED)),
            num_decode_rows=int(chunks[0]) if len(chunks) else num_rows,
            max_live_tokens=max_live,
        )


class EvictionImpl(FlashAttentionImpl):
    """Attends as vLLM does, then scores. Without eviction configured, vLLM's implementation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._state = attention_state(self, CUDAWorkerState)

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
        if state is None or not state.allocated or layer.layer_name not in state.group_of:
            return
        if layer.layer_name in state.first_layers and state.channels:
            block_size = kv_cache.shape[2]
            start_blocks(slot_mapping, block_size, state.mass, state.num_queries, state.norm)
        if KEY_NORM in state.channels:
            scales = Scales.of(layer)
            of_keys, of_values = (scales.key, scales.value) if scales else (None, None)
            add_key_norms(slot_mapping, numbers(kv_cache), state.norm, of_keys, of_values)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: FlashAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        state = self._state
        metadata = attn_metadata if isinstance(attn_metadata, EvictionMetadata) else None
        by_block = by_token = False
        if state is not None and metadata is not None:
            by_block = metadata.block_scores and layer.layer_name in state.scored_layers
            # A layer that reads another one's cache has no place of its own.
            by_token = metadata.token_scores and layer.layer_name in state.layer_places
        if state is None or metadata is None or not (by_block or by_token):
            return super().forward(
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
        scales, cache = Scales.of(layer), numbers(kv_cache)
        lse = self._attend(query, cache, metadata, output, scales)
        queries = Queries(
            query,
            cache,
            lse,
            metadata.block_table,
            metadata.seq_lens,
            metadata.query_start_loc,
            state.flags,
            self.scale,
            self.logits_soft_cap,
            query_scale=scales.query if scales else None,
            key_scale=scales.key if scales else None,
        )
        if by_block:
            self._score_blocks(state, layer, queries, metadata)
        if by_token:
            self._score_tokens(state, layer, queries, metadata)
        return output

    def _attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: FlashAttentionMetadata,
        output: torch.Tensor,
        scales: Scales | None,
    ) -> torch.Tensor:
        """vLLM's call for plain causal decoders (``FlashAttentionImpl.forward``), which computes
        the log-sum-exp in any case but does not hand it on. float32 ``[num_heads, tokens]``. It
        includes the model's sinks, where it has any (``finalize_aux`` in FlashAttention 3), and the
        scales of a quantised cache."""
        descale: dict[str, torch.Tensor | None] = {}
        if scales is not None:
            shape = (metadata.query_start_loc.shape[0] - 1, self.num_kv_heads)
            descale = {
                "q_descale": None if scales.query is None else scales.query.expand(shape),
                "k_descale": scales.key.expand(shape),
                "v_descale": scales.value.expand(shape),
            }
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        num_tokens = metadata.num_actual_tokens
        _, lse = flash_attn_varlen_func(
            q=query[:num_tokens],
            k=canonicalize_singleton_dim_strides(keys),
            v=canonicalize_singleton_dim_strides(values),
            out=output[:num_tokens],
            cu_seqlens_q=metadata.query_start_loc,
            max_seqlen_q=metadata.max_query_len,
            seqused_k=metadata.seq_lens,
            max_seqlen_k=metadata.max_seq_len,
            softmax_scale=self.scale,
            causal=metadata.causal,
            window_size=list(self.sliding_window),
            block_table=metadata.block_table,
            softcap=self.logits_soft_cap,
            scheduler_metadata=metadata.scheduler_metadata,
            fa_version=self.vllm_flash_attn_version,
            num_splits=metadata.max_num_splits,
            s_aux=self.sinks,
            return_softmax_lse=True,
            **descale,
        )
        return lse

    def _score_blocks(
        self, state: CUDAWorkerState, layer: Any, queries: Queries, metadata: EvictionMetadata
    ) -> None:
        if layer.layer_name in state.first_layers and state.config.score_at(BLOCK) != "sum":
            age_blocks(
                metadata.block_table,
                metadata.seq_lens,
                metadata.query_start_loc,
                state.flags,
                state.mass,
                state.num_queries,
                block_size=queries.kv_cache.shape[2],
                window=state.window or 2**30,
                decode_weight=state.config.score_query_stride,
                log2_decay=state.log2_decay,
            )
        for options in self._parts(state, metadata):
            add_block_mass(queries, state.mass, **options)

    def _score_tokens(
        self, state: CUDAWorkerState, layer: Any, queries: Queries, metadata: EvictionMetadata
    ) -> None:
        place, tokens = state.layer_places[layer.layer_name], state.tokens
        peak = tokens.peak[place] if tokens.peak.numel() else None
        for options in self._parts(state, metadata):
            add_token_mass(queries, tokens.mass[place], peak, **options)

    @staticmethod
    def _parts(state: CUDAWorkerState, metadata: EvictionMetadata) -> Iterator[dict[str, Any]]:
        """What a launch is told: decodes; a chunk's last queries, and a sample of its others."""
        decode, num_rows = metadata.num_decode_rows, metadata.seq_lens.shape[0]
        common = {
            "max_seq_len": metadata.max_live_tokens,
            "window": state.window,
            "decode_weight": state.config.score_query_stride,
            "log2_decay": state.log2_decay,
        }
        yield {**common, "rows": (0, decode), "one_query": True}
        chunks = {**common, "rows": (decode, num_rows), "one_query": False}
        stride = state.config.prompt_stride
        if stride == 1:
            yield chunks
            return
        in_full = SCORED_IN_FULL if state.window is None else min(state.window, SCORED_IN_FULL)
        yield {**chunks, "window": in_full}
        if state.warming_up or metadata.max_query_len > SCORED_IN_FULL:
            yield {**chunks, "skip": SCORED_IN_FULL, "stride": stride}


class EvictionCUDABackend(FlashAttentionBackend):
    """vLLM's ``CUSTOM`` backend in an engine with eviction."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        return EvictionImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        return EvictionMetadataBuilder
