"""The CPU backend: vLLM's own attention, on compacted block tables, with block scores.

Seams of ``vllm/v1/attention/backends/cpu_attn.py``: the builder's ``build``, the impl's
``do_kv_cache_update`` (sees every key and value written) and ``forward`` (sees every query).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from ..config import SCORED_IN_FULL
from ..policies import ATTENTION, GRAPH, KEY_NORM, TOKEN_MASS, TOKEN_PEAK, TOKENS
from ..spec import EvictableSpec
from .block_mass import block_mass
from .cache_layout_cpu import KEYS, CacheLayout
from .compaction import compact_metadata
from .state import attention_state, builder_state
from .state_cpu import CPUWorkerState
from .token_mass import token_mass


@dataclass
class ScoredRow:
    """One request of the batch whose queries are scored.

    ``block_ids``: int64 ``[n]``, live blocks in order; the request has ``num_tokens`` in the
    batch, which end at ``stop`` there and are the last of ``seq_len`` (compacted) tokens. The
    queries that are scored lie at ``places``, int64, among the latter, and count ``weights``,
    float32. ``window`` last ones are asked for. ``afresh``: a token's older mass is forgotten.
    """

    request_id: str
    needs: frozenset[str]
    num_tokens: int
    first_position: int
    stop: int
    seq_len: int
    window: int
    places: torch.Tensor
    weights: torch.Tensor
    afresh: bool
    block_ids: torch.Tensor

    @property
    def graph(self) -> bool:
        """Whether block-to-block mass is wanted."""
        return GRAPH in self.needs

    def queries(self, query: torch.Tensor) -> torch.Tensor:
        """Those at ``places``, of the whole batch's."""
        return query[self.stop - self.seq_len + self.places]


@dataclass
class EvictionMetadata(CPUAttentionMetadata):
    """vLLM's metadata, and the rows to score.

    ``block_rows``: those whose blocks are scored; ``token_rows``: those at token granularity.
    ``slots``, ``positions``: int64, where the latter's new tokens are written, and what their
    places in their sequences are.
    """

    block_rows: tuple[ScoredRow, ...] = ()
    token_rows: tuple[ScoredRow, ...] = ()
    slots: torch.Tensor | None = None
    positions: torch.Tensor | None = None


class EvictionMetadataBuilder(CPUAttentionMetadataBuilder):
    """Compacts before it builds. Of layers that do not evict, vLLM's builder."""

    def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        state = builder_state(vllm_config, CPUWorkerState)
        self._state = state if isinstance(kv_cache_spec, EvictableSpec) else None

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        """``CPUAttentionMetadata`` over live blocks only."""
        if self._state is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        compacted = compact_metadata(common_attn_metadata, self.block_size)
        built = super().build(common_prefix_len, compacted, fast_build)
        made = EvictionMetadata(**vars(built))
        if self._state.needs:
            num_tokens = common_attn_metadata.seq_lens.tolist()
            rows = tuple(self._rows(built, num_tokens, self._state))
            made.block_rows = tuple(row for row in rows if row.needs & {ATTENTION, GRAPH})
            made.token_rows = tuple(row for row in rows if TOKENS in row.needs)
        if made.token_rows:
            made.slots = torch.cat(
                [made.slot_mapping[r.stop - r.num_tokens : r.stop] for r in made.token_rows]
            )
            made.positions = torch.cat(
                [
                    torch.arange(r.first_position, r.first_position + r.num_tokens)
                    for r in made.token_rows
                ]
            )
        return made

    def _rows(
        self, built: CPUAttentionMetadata, num_tokens: list[int], state: CPUWorkerState
    ) -> Iterator[ScoredRow]:
        starts = built.query_start_loc.tolist()
        seq_lens = built.seq_lens.tolist()
        # Rows of the batch are the runner's rows, in order (V1 runner).
        for i, request_id in enumerate(state.row_ids[: len(seq_lens)]):
            needs = state.needs.get(request_id, frozenset())
            stop, seq_len = starts[i + 1], seq_lens[i]
            if not needs & {ATTENTION, GRAPH, TOKENS} or stop == starts[i]:
                continue
            own = state.windows.get(request_id)
            window = state.window if own is None else own
            num_queries = stop - starts[i]
            window = num_queries if window is None else min(window, num_queries)
            places = torch.arange(seq_len - window, seq_len)
            weights = state.decay ** (seq_len - 1 - places).float()
            if num_queries == 1:
                weights *= state.config.score_query_stride
                counts = torch.tensor([state.scores_decode(num_tokens[i] - 1, own)])
            else:
                sampled = places < seq_len - SCORED_IN_FULL
                if own is not None or GRAPH in needs:
                    sampled[:] = False
                counts = ~sampled | (places % state.config.prompt_stride == 0)
                weights[sampled] *= state.config.prompt_stride
            num_blocks = -(-seq_len // self.block_size)
            block_ids = built.block_table[i, :num_blocks].long()
            yield ScoredRow(
                request_id,
                needs,
                num_queries,
                num_tokens[i] - num_queries,
                stop,
                seq_len,
                window,
                places[counts],
                weights[counts],
                own is not None and num_queries >= own,
                block_ids,
            )


class EvictionImpl(CPUAttentionBackendImpl):
    """Attends as vLLM does, then scores. Without eviction configured, vLLM's implementation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._state = attention_state(self, CPUWorkerState)
        self._layout: CacheLayout | None = None

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
        if state is None or not state.active or layer.layer_name not in state.group_of:
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
        state = self._state
        if state is not None and isinstance(attn_metadata, EvictionMetadata):
            self._score_blocks(state, layer, query, kv_cache, attn_metadata.block_rows)
            self._score_tokens(state, layer, query, kv_cache, attn_metadata)
        return attended

    def _score_blocks(
        self,
        state: CPUWorkerState,
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        rows: tuple[ScoredRow, ...],
    ) -> None:
        if layer.layer_name in state.first_layers and state.decay != 1.0:
            for row in rows:
                # Older attention ages by the tokens of this step, scored or not.
                state.mass[row.block_ids] *= state.decay**row.num_tokens
        if layer.layer_name in state.scored_layers:
            for row in rows:
                if len(row.places):
                    self._score(state, layer, query, kv_cache, row)

    def _score_tokens(
        self,
        state: CPUWorkerState,
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: EvictionMetadata,
    ) -> None:
        """Start the scores of the tokens just written, and add this step's attention to all."""
        if metadata.slots is None or layer.layer_name not in state.layer_places:
            return  # a layer that reads another one's cache has no place of its own
        block_size = kv_cache.shape[2]
        place = state.layer_places[layer.layer_name]
        position, mass, peak = (
            array[place] for array in (state.tokens.position, state.tokens.mass, state.tokens.peak)
        )
        with state.timed("token_mass"):
            blocks = metadata.slots.div(block_size, rounding_mode="floor")
            offsets = metadata.slots % block_size
            assert metadata.positions is not None
            position[blocks, :, offsets] = metadata.positions.int()[:, None]
            for array in (mass, peak):
                if len(array):
                    array[blocks, :, offsets] = 0.0
            for row in metadata.token_rows:
                if not len(row.places) or TOKEN_MASS not in row.needs:
                    continue
                if row.afresh:
                    mass[row.block_ids] = 0.0
                elif state.decay != 1.0:
                    # A decode's query that is scored stands for those that are not.
                    stride = state.config.score_query_stride
                    elapsed = stride if row.num_tokens == 1 else row.num_tokens
                    mass[row.block_ids] *= state.decay**elapsed
                received, highest = token_mass(
                    row.queries(query),
                    self._keys(layer, kv_cache, row.block_ids),
                    places=row.places,
                    weights=row.weights,
                    scale=self.scale,
                    soft_cap=self.logits_soft_cap,
                    sinks=self.sinks,
                )
                # [heads, blocks * tokens] -> [blocks, heads, tokens]
                received, highest = (
                    x.unflatten(1, (-1, block_size)).transpose(0, 1) for x in (received, highest)
                )
                mass.index_add_(0, row.block_ids, received)
                if TOKEN_PEAK in row.needs:
                    peak[row.block_ids] = torch.maximum(peak[row.block_ids], highest)

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
            query_blocks = None
            if row.graph:
                query_blocks = row.places.div(block_size, rounding_mode="floor")
                query_blocks -= int(query_blocks[0])
            mass = block_mass(
                row.queries(query),
                keys,
                places=row.places,
                weights=row.weights,
                block_size=block_size,
                scale=self.scale,
                soft_cap=self.logits_soft_cap,
                sinks=self.sinks,
                query_blocks=query_blocks,
            )
        with state.timed("accumulate"):
            if row.graph:
                group = state.group_of[layer.layer_name]
                state.add_graph_rows(row.request_id, group, row.block_ids, mass)
                mass = mass.sum(0)
            if layer.layer_name in state.first_layers:
                first = torch.arange(len(row.block_ids)) * block_size
                seen = (row.seq_len - first).clamp(max=row.window).float()
                if row.num_tokens == 1:
                    seen *= state.config.score_query_stride
                state.num_queries.index_add_(0, row.block_ids, seen)
            state.mass.index_add_(0, row.block_ids, mass)

    def _keys(self, layer: Any, kv_cache: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
        """Keys of the blocks in plain order, ``[num_kv_heads, n * block_size, head_size]``."""
        return self.layout(layer, kv_cache).read(kv_cache, block_ids, KEYS)

    def layout(self, layer: Any, kv_cache: torch.Tensor) -> CacheLayout:
        """Where the elements of keys and values lie in ``kv_cache``."""
        if self._layout is None:
            self._layout = CacheLayout.of(kv_cache, layer, self.kv_cache_dtype)
        return self._layout


class EvictionCPUBackend(CPUAttentionBackend):
    """Takes the place of ``CPU_ATTN`` in workers of an engine with eviction."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return EvictionImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return EvictionMetadataBuilder
