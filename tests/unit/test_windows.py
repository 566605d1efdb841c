"""Sliding-window layers beside layers that evict: which spec, group and manager each one gets."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.core.kv_cache_utils import get_kv_cache_groups
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_plugins import EvictionConfigError
from vllm_plugins.connector import KVEvictionConnector
from vllm_plugins.manager import EvictableManager
from vllm_plugins.prefix_sharing import PrefixSharing
from vllm_plugins.refusals.engine import num_evicting_layers
from vllm_plugins.spec import evictable_specs, layer_groups
from vllm_plugins.window import WindowManager, WindowSpec

CACHE = {"block_size": 32, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
FULL, WINDOW = FullAttentionSpec(**CACHE), SlidingWindowSpec(**CACHE, sliding_window=96)


def specs(kinds):
    """From ``"f"`` and ``"w"`` for each layer."""
    return {f"layers.{i}": FULL if kind == "f" else WINDOW for i, kind in enumerate(kinds)}


def grouped(made, number=1):
    """What vLLM makes of specs: its groups, and which of them evict."""
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        attention_config=SimpleNamespace(hisparse_config=None),
        cache_config=SimpleNamespace(
            get_resolved_kv_cache_layout=lambda: SimpleNamespace(is_block_outermost=False)
        ),
        speculative_config=None,
    )
    groups = get_kv_cache_groups(config, evictable_specs(made, number, 1024))
    return groups, layer_groups(KVCacheConfig(1, [], groups))


def layers(*numbers):
    return [f"layers.{number}" for number in numbers]


@pytest.mark.parametrize(
    ("kinds", "number", "expected"),
    [
        ("ffff", 1, {0: layers(0, 1, 2, 3)}),
        ("ffff", 2, {0: layers(0, 1), 1: layers(2, 3)}),
        ("wfwf", 1, {1: layers(1, 3)}),
        ("wwwwwf" * 2, 1, {5: layers(5, 11)}),
        ("wfwfwfwf", 2, {2: layers(1, 3), 3: layers(5, 7)}),
        ("wffwf", 1, {1: layers(1, 4), 2: layers(2)}),  # as many layers a group as are windowed
    ],
)
def test_groups_that_evict(kinds, number, expected):
    groups, evicting = grouped(specs(kinds), number)
    assert evicting == expected
    for place, group in enumerate(groups):
        manager = KVCacheSpecRegistry.get_manager_class(group.kv_cache_spec)
        assert manager is (EvictableManager if place in expected else WindowManager)


def test_the_memory_of_a_window_is_planned_as_by_vllm():
    made = evictable_specs(specs("wf"), 1, 1024)["layers.0"]
    assert type(made) is WindowSpec
    assert vars(made) == vars(WINDOW)
    for name in ("max_memory_usage_bytes", "max_admission_blocks_per_request", "page_size_bytes"):
        assert getattr(WindowSpec, name) is getattr(SlidingWindowSpec, name)


def test_blocks_that_vllm_enlarges_are_refused():
    """Where a window's layers have more KV heads: all blocks of a pool take as many bytes."""
    wide = dataclasses.replace(WINDOW, num_kv_heads=4)
    groups, evicting = grouped({"layers.0": wide, "layers.1": FULL})
    (group,) = evicting
    manager = EvictableManager.__new__(EvictableManager)
    manager.kv_cache_spec = groups[group].kv_cache_spec
    assert manager.kv_cache_spec.block_size == 64
    connector = KVEvictionConnector.__new__(KVEvictionConnector)
    connector._block_size = 32
    coordinator = SimpleNamespace(single_type_managers=[manager])
    with pytest.raises(EvictionConfigError, match="more bytes a token than those that evict"):
        connector.bind_kv_cache_manager(SimpleNamespace(block_pool=None, coordinator=coordinator))


def test_a_window_that_never_binds_evicts():
    made = evictable_specs(specs("wf"), 1, 96)
    assert len({spec.layer_group for spec in made.values()}) == 1
    assert {spec.sliding_window for spec in made.values()} == {None}


@pytest.mark.parametrize(
    ("made", "number", "sentence"),
    [
        (specs("ww"), 1, "every layer of the model has a sliding window, so nothing is left"),
        (specs("wfwf"), 4, "does not divide the model's 2 layers with full attention"),
        ({"layers.0": WINDOW, "layers.1": MLAAttentionSpec(**CACHE)}, 1, "latent attention (MLA)"),
    ],
)
def test_what_is_refused(made, number, sentence):
    with pytest.raises(EvictionConfigError) as error:
        evictable_specs(made, number, 1024)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("config", "max_model_len", "expected"),
    [
        ({}, 1024, 4),
        ({"sliding_window": 96, "layer_types": ["sliding_attention", "full_attention"] * 2}, 97, 2),
        ({"sliding_window": 96, "layer_types": ["sliding_attention", "full_attention"] * 2}, 96, 4),
        ({"sliding_window": None, "layer_types": ["full_attention"] * 4}, 1024, 4),
    ],
)
def test_layers_that_evict_as_a_configuration_tells(config, max_model_len, expected):
    assert num_evicting_layers(SimpleNamespace(**config), 4, max_model_len) == expected


def test_a_window_hashes_nothing_behind_the_first_eviction(monkeypatch):
    hashed = []
    monkeypatch.setattr(
        SlidingWindowManager,
        "cache_blocks",
        lambda self, request, number, replay_boundaries: hashed.append((number, replay_boundaries)),
    )
    manager = WindowManager.__new__(WindowManager)
    sharing, request = PrefixSharing(), SimpleNamespace(request_id="r", num_prompt_tokens=200)
    manager.attach(SimpleNamespace(sharing=sharing))
    manager.cache_blocks(request, 64, replay_boundaries=[199])
    sharing.first_eviction("r", 100)
    manager.cache_blocks(request, 128, replay_boundaries=[199])
    sharing.forget("r")
    manager.cache_blocks(request, 192, replay_boundaries=[199])
    # A prompt is taken up again before its last 32 tokens.
    assert hashed == [(number, [199, 168]) for number in (64, 100, 192)]
