"""Types of keys and values: which are refused where, and how many bytes a block takes."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from harness.resources.kv_bytes import bytes_per_block
from harness.resources.passthrough import Passthrough
from harness.study.specification import EngineSpecification
from vllm_plugins.attention.quantised_cache import FLOAT8, Scales, numbers
from vllm_plugins.config import EvictionConfig
from vllm_plugins.parsing import EvictionConfigError
from vllm_plugins.platforms import _PLATFORMS
from vllm_plugins.refusals import engine as refusals

BFLOAT16 = ("bfloat16",)


@pytest.fixture
def on(monkeypatch):
    def platform(name):
        monkeypatch.setattr(refusals, "platform", lambda: _PLATFORMS[name])

    return platform


@pytest.mark.parametrize(
    ("platform", "dtype", "sentence"),
    [
        ("cuda", "auto", None),
        ("cuda", "bfloat16", None),
        ("cuda", "fp8", None),
        ("cuda", "fp8_e4m3", None),
        ("cuda", "fp8_e5m2", 'fp8_e5m2, which is not tested with eviction; use .*"fp8" on CUDA'),
        ("cuda", "fp8_per_token_head", "kv_cache_dtype is fp8_per_token_head, which is not tested"),
        ("cuda", "nvfp4", "kv_cache_dtype is nvfp4"),
        ("cuda", "float16", "kv_cache_dtype is float16"),
        ("cpu", "auto", None),
        ("cpu", "bfloat16", None),
        ("cpu", "fp8", 'fp8, which eviction reads on CUDA only; use kv_cache_dtype="auto"'),
        ("cpu", "fp8_e4m3", "fp8_e4m3, which eviction reads on CUDA only"),
        ("cpu", "fp8_e5m2", "kv_cache_dtype is fp8_e5m2, which is not tested"),
    ],
)
def test_what_a_platform_reads(platform, dtype, sentence, on):
    on(platform)
    if sentence is None:
        refusals.check_kv_cache_dtype(dtype, BFLOAT16)
        return
    with pytest.raises(EvictionConfigError, match=sentence) as error:
        refusals.check_kv_cache_dtype(dtype, BFLOAT16)
    assert "--kv-cache-dtype" in str(error.value)


@pytest.mark.parametrize(
    ("platform", "dtype", "cache", "sentence"),
    [
        ("cuda", torch.bfloat16, {"cache_dtype": "fp8"}, None),
        ("cuda", torch.float16, {"cache_dtype": "auto"}, None),
        ("cuda", torch.float16, {"cache_dtype": "fp8"}, 'use dtype="bfloat16"'),
        (
            "cuda",
            torch.bfloat16,
            {"cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0"]},
            "drop it (--kv-cache-dtype-skip-layers)",
        ),
        (
            "cuda",
            torch.bfloat16,
            {"cache_dtype": "auto", "kv_cache_dtype_skip_layers": ["0"]},
            None,
        ),
        ("cpu", torch.float16, {"cache_dtype": "fp8"}, None),  # refused by its type
    ],
)
def test_what_has_to_fit_to_a_quantised_cache(platform, dtype, cache, sentence, on):
    on(platform)
    made = made_up_config(**{"kv_cache_dtype_skip_layers": [], **cache}, dtype=dtype)
    made.speculative_config = None
    made.scheduler_config = SimpleNamespace(disable_hybrid_kv_cache_manager=False)
    sizes = ("pipeline", "decode_context", "prefill_context")
    made.parallel_config = SimpleNamespace(
        **{f"{name}_parallel_size": 1 for name in sizes}, use_ubatching=False
    )
    obstacles = refusals._engine_obstacles(made, EvictionConfig())
    told = [reason for refused, reason in obstacles if refused]
    assert len(told) == (sentence is not None)
    assert sentence is None or sentence in told[0]


def test_a_server_hands_on_what_some_platform_reads():
    config = EvictionConfig()
    for dtype in ("auto", "bfloat16", "fp8", "fp8_e4m3"):
        Passthrough(["--kv-cache-dtype", dtype]).check(config, [])


def made_up_config(cache_dtype, dtype=torch.bfloat16, **of_cache):
    model = SimpleNamespace(
        dtype=dtype,
        hf_text_config=SimpleNamespace(),
        max_model_len=64,
        get_num_layers=lambda parallel: 6,
        get_num_kv_heads=lambda parallel: 3,
        get_head_size=lambda: 64,
    )
    cache = SimpleNamespace(cache_dtype=cache_dtype, block_size=16, **of_cache)
    return SimpleNamespace(model_config=model, parallel_config=None, cache_config=cache)


def test_bytes_of_a_block_follow_the_caches_type():
    specification = EngineSpecification(
        "m", "f", 100, 4, 16, 8, 8, True, eviction={"layer_groups": 2}
    )

    def size(*given):
        return bytes_per_block(made_up_config(*given), specification)

    assert size("auto") == size("bfloat16") == 3 * 3 * 16 * 128 * 2
    assert size("fp8") == size("fp8_e4m3") == size("auto") // 2
    assert size("auto", torch.float32) == 2 * size("auto")
    assert size("fp8", torch.float32) == size("fp8")


def test_specs_keep_the_caches_type():
    from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

    from vllm_plugins.spec import EvictableSpec, evictable_specs

    plain = FullAttentionSpec(block_size=16, num_kv_heads=3, head_size=64, dtype=torch.bfloat16)
    mode = get_kv_quant_mode("fp8")
    narrow = replace(plain, dtype=torch.uint8, kv_quant_mode=mode)
    names = [f"model.layers.{i}.attn" for i in range(4)]
    made = evictable_specs(dict.fromkeys(names, narrow), layer_groups=2, max_model_len=64)
    for spec in made.values():
        assert isinstance(spec, EvictableSpec)
        assert (spec.dtype, spec.kv_quant_mode) == (torch.uint8, mode)
        assert spec.page_size_bytes == plain.page_size_bytes // 2
    merged = EvictableSpec.merge([made[name] for name in names[:2]])
    assert (merged.dtype, merged.kv_quant_mode) == (torch.uint8, mode)


def layer(cache, quantised_queries=True):
    return SimpleNamespace(
        kv_cache=cache,
        impl=SimpleNamespace(supports_quant_query_input=quantised_queries),
        _q_scale=torch.tensor(2.0),
        _k_scale=torch.tensor(3.0),
        _v_scale=torch.tensor([4.0]),
    )


def test_what_numbers_of_a_cache_count():
    cache = torch.zeros(2, 1, 16, 8, dtype=torch.uint8)
    scales = Scales.of(layer(cache))
    assert (scales.query, scales.key, scales.value) == (2.0, 3.0, 4.0)
    assert Scales.of(layer(cache, quantised_queries=False)).query is None
    assert Scales.of(layer(cache.bfloat16())) is None
    assert numbers(cache).dtype == FLOAT8
    assert numbers(cache).data_ptr() == cache.data_ptr()
    plain = cache.bfloat16()
    assert numbers(plain) is plain
