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
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from .config import EvictionConfig
from .manager import EvictableManager
from .parsing import EvictionConfigError
from .refusals.engine import SENTENCES, check_layer_groups
from .window import WindowSpec


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
        # vLLM takes an AssertionError for "these do not belong together".
        assert all(isinstance(spec, EvictableSpec) for spec in specs), "a layer does not evict"
        groups = {spec.layer_group for spec in specs}
        assert len(groups) == 1, f"layer groups {sorted(groups)} have a block table each"
        return dataclasses.replace(
            super().merge(specs), layer_group=groups.pop(), layer_groups=specs[0].layer_groups
        )


def evictable_specs(
    specs: Mapping[str, Any], layer_groups: int, max_model_len: int
) -> dict[str, EvictableSpec | WindowSpec]:
    """Specs of a model's layers: evictable ones in contiguous groups, those of windows as they are.

    Args:
        specs: layer name to vLLM's spec, as a worker reports them.
        layer_groups: number of groups of equal size.
        max_model_len: tokens; a window at least this long hides nothing from any query.

    Raises:
        EvictionConfigError: a layer with another kind of attention, no layer without a window, or
            groups of unequal size (vLLM would pad them with layers that do not exist, at the cost
            of memory).

    """
    windowed = {name for name, spec in specs.items() if _is_windowed(spec, max_model_len)}
    evicting = sorted((n for n in specs if n not in windowed), key=extract_layer_index)
    for name in evicting:
        if obstacle := _obstacle(specs[name]):
            raise EvictionConfigError(f"layer {name} {obstacle}")
    if not evicting:
        window = max(spec.sliding_window for spec in specs.values())
        raise EvictionConfigError(SENTENCES["window"].format(model="the model", window=window))
    check_layer_groups(len(evicting), layer_groups)
    per_group = len(evicting) // layer_groups
    made: dict[str, EvictableSpec | WindowSpec] = {}
    for name, spec in specs.items():
        if name in windowed:
            made[name] = WindowSpec(**_fields(spec, WindowSpec))
            continue
        fields = _fields(spec, EvictableSpec)
        fields.pop("sliding_window", None)  # one that never binds is none
        group = evicting.index(name) // per_group
        made[name] = EvictableSpec(**fields, layer_group=group, layer_groups=layer_groups)
    return made


def layer_groups(kv_cache_config: KVCacheConfig) -> dict[int, list[str]]:
    """The KV-cache groups whose layers evict: vLLM's number of each, to its layers in order.

    They are at least the groups that ``evictable_specs`` made: vLLM gives all its groups as many
    layers as the kind of layer has that the model has fewest of, and splits what is more.
    """
    groups = {}
    for number, group in enumerate(kv_cache_config.kv_cache_groups):
        spec = group.kv_cache_spec
        if isinstance(spec, UniformTypeKVCacheSpecs):
            spec = spec.first_spec
        if isinstance(spec, EvictableSpec):
            groups[number] = list(group.layer_names)
    return groups


def _fields(spec: Any, kind: type) -> dict[str, Any]:
    """Those of a spec that a spec of ``kind`` has too."""
    known = {f.name for f in dataclasses.fields(kind) if f.init}
    return {name: value for name, value in vars(spec).items() if name in known}


def _is_windowed(spec: Any, max_model_len: int) -> bool:
    return type(spec) is SlidingWindowSpec and spec.sliding_window < max_model_len


def _obstacle(spec: Any) -> str | None:
    """Why a layer's blocks cannot be evicted, and what to change; None where they can."""
    if isinstance(spec, MLAAttentionSpec):
        return (
            "uses multi-head latent attention (MLA); "
            "use a model with plain multi-head or grouped-query attention"
        )
    if type(spec) not in (FullAttentionSpec, SlidingWindowSpec):
        return (
            f"keeps its cache as {type(spec).__name__}; "
            "use a model whose layers have plain full attention or a sliding window"
        )
    return None


# Registering into an empty registry would stop vLLM's lazy registration of its own specs.
register_all_kvcache_specs(None)
KVCacheSpecRegistry.register(
    EvictableSpec, manager_class=EvictableManager, uniform_type_base_spec=FullAttentionSpec
)
