"""KV-cache spec of layers whose blocks can be evicted. Importing this module registers it.

vLLM finds a group's manager by the type of its spec (``vllm/v1/kv_cache_spec_registry.py``),
so the spec is how our manager gets in. It travels from the workers to the scheduler's process
by pickle, which imports, and so registers, it there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from .config import EvictionConfig
from .manager import EvictableManager
from .parsing import EvictionConfigError
from .refusals.engine import check_layer_groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvictableSpec(FullAttentionSpec):
    """Full attention whose blocks may be nulled anywhere in the table.

    ``layer_group``: specs of different groups refuse to merge, so vLLM's hybrid cache manager
    gives each group a block table and a manager of its own. ``layer_groups``: how many there are.
    """

    layer_group: int = 0
    layer_groups: int = 1

    def is_uniform_with_collection(self, kv_cache_specs: Mapping[str, Any]) -> bool:
        return all(
            isinstance(spec, EvictableSpec) and spec.layer_group == self.layer_group
            for spec in kv_cache_specs.values()
        )

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """As vLLM's; less where no request may keep all, so that a context may outgrow the pool."""
        whole = super().max_memory_usage_bytes(vllm_config)
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        planned = EvictionConfig.parse(extra).planned_blocks(
            vllm_config.model_config.max_model_len,
            self.block_size,
            vllm_config.max_in_flight_tokens,
        )
        return whole if planned is None else min(whole, planned * self.page_size_bytes)

    @classmethod
    def merge(cls, specs: list[EvictableSpec]) -> EvictableSpec:
        groups = {spec.layer_group for spec in specs}
        # vLLM takes an AssertionError for "these do not belong together".
        assert len(groups) == 1, f"layer groups {sorted(groups)} have a block table each"
        return dataclasses.replace(
            super().merge(specs), layer_group=groups.pop(), layer_groups=specs[0].layer_groups
        )


def evictable_specs(
    specs: Mapping[str, Any], layer_groups: int, max_model_len: int
) -> dict[str, EvictableSpec]:
    """Specs of a model's layers, turned evictable and split into contiguous groups.

    Args:
        specs: layer name to vLLM's spec, as a worker reports them.
        layer_groups: number of groups of equal size.
        max_model_len: tokens; a window at least this long hides nothing from any query.

    Raises:
        EvictionConfigError: a layer without plain full attention, or groups of unequal size
            (vLLM would pad them with layers that do not exist, at the cost of memory).

    """
    check_layer_groups(len(specs), layer_groups)
    names = sorted(specs, key=extract_layer_index)
    per_group = len(names) // layer_groups
    group_of = {name: i // per_group for i, name in enumerate(names)}
    known = {f.name for f in dataclasses.fields(EvictableSpec) if f.init}
    evictable = {}
    for name, spec in specs.items():
        if obstacle := _obstacle(spec, max_model_len):
            raise EvictionConfigError(f"layer {name} {obstacle}")
        fields = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.init}
        # A window that never binds is no window: of its spec only that field is dropped.
        fields = {key: fields[key] for key in fields.keys() & known - {"sliding_window"}}
        evictable[name] = EvictableSpec(
            **fields, layer_group=group_of[name], layer_groups=layer_groups
        )
    return evictable


def _obstacle(spec: Any, max_model_len: int) -> str | None:
    """Why a layer's blocks cannot be evicted, and what to change; None where they can."""
    if isinstance(spec, MLAAttentionSpec):
        return (
            "uses multi-head latent attention (MLA); "
            "use a model with plain multi-head or grouped-query attention"
        )
    if type(spec) not in (FullAttentionSpec, SlidingWindowSpec):
        return (
            f"keeps its cache as {type(spec).__name__}; "
            "use a model whose layers all have plain full attention"
        )
    window = spec.sliding_window or getattr(spec, "attention_chunk_size", None)
    if window is not None and window < max_model_len:
        return (
            f"attends to the last {window:,} tokens only; set max_model_len to at most {window:,}, "
            "or use a model with full attention in every layer"
        )
    return None


# Registering into an empty registry would stop vLLM's lazy registration of its own specs.
register_all_kvcache_specs(None)
KVCacheSpecRegistry.register(
    EvictableSpec, manager_class=EvictableManager, uniform_type_base_spec=FullAttentionSpec
)
