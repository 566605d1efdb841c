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
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from .config import EvictionConfigError
from .manager import EvictableManager


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvictableSpec(FullAttentionSpec):
    """Full attention whose blocks may be nulled anywhere in the table.

    ``layer_group``: specs of different groups refuse to merge, so vLLM's hybrid cache manager
    gives each group a block table and a manager of its own.
    """

    layer_group: int = 0

    def is_uniform_with_collection(self, kv_cache_specs: Mapping[str, Any]) -> bool:
        return all(
            isinstance(spec, EvictableSpec) and spec.layer_group == self.layer_group
            for spec in kv_cache_specs.values()
        )

    @classmethod
    def merge(cls, specs: list[EvictableSpec]) -> EvictableSpec:
        groups = {spec.layer_group for spec in specs}
        # vLLM takes an AssertionError for "these do not belong together".
        assert len(groups) == 1, f"layer groups {sorted(groups)} have a block table each"
        return dataclasses.replace(super().merge(specs), layer_group=groups.pop())


def evictable_specs(specs: Mapping[str, Any], layer_groups: int) -> dict[str, EvictableSpec]:
    """Specs of a model's layers, turned evictable and split into contiguous groups.

    Args:
        specs: layer name to vLLM's spec, as a worker reports them.
        layer_groups: number of groups of equal size.

    Raises:
        EvictionConfigError: a layer without plain full attention, or groups of unequal size
            (vLLM would pad them with layers that do not exist, at the cost of memory).

    """
    for name, spec in specs.items():
        if type(spec) is not FullAttentionSpec or spec.sliding_window or spec.attention_chunk_size:
            raise EvictionConfigError(
                f"layer {name} has {type(spec).__name__} with a window or state of its own; "
                f"use a model whose layers all have plain full attention"
            )
    check_layer_groups(len(specs), layer_groups)
    names = sorted(specs, key=extract_layer_index)
    per_group = len(names) // layer_groups
    group_of = {name: i // per_group for i, name in enumerate(names)}
    return {
        name: EvictableSpec(
            **{f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.init},
            layer_group=group_of[name],
        )
        for name, spec in specs.items()
    }


def check_layer_groups(num_layers: int, layer_groups: int) -> None:
    """Refuse a number of groups that does not divide the model's layers."""
    if num_layers % layer_groups:
        divisors = [g for g in range(1, num_layers + 1) if num_layers % g == 0]
        raise EvictionConfigError(
            f"layer_groups is {layer_groups}, which does not divide the model's {num_layers} "
            f"layers; use one of: {', '.join(map(str, divisors))}"
        )


# Registering into an empty registry would stop vLLM's lazy registration of its own specs.
register_all_kvcache_specs(None)
KVCacheSpecRegistry.register(
    EvictableSpec, manager_class=EvictableManager, uniform_type_base_spec=FullAttentionSpec
)
