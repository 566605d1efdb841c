"""Keys and values of 8 bits under FlashAttention 3: what holds in 16 bits holds there.

The model has no scales of its own, so all are 1. ``scaled`` puts others into vLLM's buffers, which
its kernels, ours and captured graphs read when they run.
"""

import pytest
import torch

from tests.engine.conftest import connector_of
from vllm_plugins.attention.quantised_cache import FLOAT8
from vllm_plugins.attention.state import worker_state
from vllm_plugins.attention.token_mass import token_mass

from .engines import ENGINE, NEEDS_GPU, POLICIES, check_idle, generate, records, tokens
from .mass import mass_by_step

pytestmark = NEEDS_GPU
FP8 = {"kv_cache_dtype": "fp8"}
ANSWERED = {"block": 64, "token": 200}
"""Tokens of an answer."""
KEPT = {"kv_budget_tokens": 10**7}
"""Scored, and nothing goes."""
SCALES = {"_q_scale": 0.5, "_k_scale": 0.25, "_v_scale": 2.0}


@pytest.fixture(scope="module")
def stock(engines, prompts):
    """Stock vLLM's answers over a quantised cache, by their length."""
    llm = engines(None, **FP8)
    return {length: tokens(generate(llm, prompts, None, length)) for length in ANSWERED.values()}


@pytest.fixture
def scaled(engines):
    """The engine with ``SCALES`` in every layer."""
    llm = engines({}, **FP8)
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    assert len(layers) == 6

    def fill(scales):
        with torch.inference_mode():  # as vLLM may have made them
            for layer in layers.values():
                for name, scale in scales.items():
                    getattr(layer, name).fill_(scale)

    fill(SCALES)
    yield llm
    fill(dict.fromkeys(SCALES, 1.0))


@pytest.fixture
def compared(monkeypatch):
    """Mass that chunks gave to tokens of a layer, and that of exact attention over the dequantised
    cache, float32 ``[num_kv_heads, tokens]`` each; a pair for every launch."""
    from vllm_plugins.attention import cuda  # imports what CUDA builds alone have

    pairs, launch = [], cuda.add_token_mass

    def noted(queries, mass, peak, **options):
        before = mass.clone()
        launch(queries, mass, peak, **options)
        for row in range(*options["rows"]) if not options["one_query"] else ():
            blocks = blocks_of(queries, row)
            given = (mass - before)[blocks].transpose(0, 1).flatten(1)
            pairs.append((given.cpu(), reference(queries, row)))

    monkeypatch.setattr(cuda, "add_token_mass", noted)
    return pairs


def blocks_of(queries, row):
    length, block_size = int(queries.seq_lens[row]), queries.kv_cache.shape[2]
    return queries.block_table[row, : -(-length // block_size)].long()


def reference(queries, row):
    """A softmax in float32 of what the bytes of queries and cache stand for."""
    head_size = queries.query.shape[-1]
    length = int(queries.seq_lens[row])
    start, stop = queries.query_start_loc[row : row + 2].tolist()
    assert queries.query.dtype == queries.kv_cache.dtype == FLOAT8
    cached = queries.kv_cache.view(torch.uint8)[blocks_of(queries, row)].view(FLOAT8).float()
    keys = cached[..., :head_size].transpose(0, 1).flatten(1, 2) * queries.key_scale
    query = queries.query[start:stop].float() * queries.query_scale
    given, _ = token_mass(
        query.cpu(),
        keys.cpu(),
        places=torch.arange(length - (stop - start), length),
        weights=torch.ones(stop - start),
        scale=queries.scale,
    )
    return given


@pytest.mark.parametrize("granularity", ANSWERED)
def test_sparsity_0_gives_stocks_tokens(granularity, stock, engines, prompts):
    llm, length = engines({}, **FP8), ANSWERED[granularity]
    common = {"kv_granularity": granularity}
    for policy in POLICIES:
        extra = {"kv_policy": policy, "kv_sparsity": 0, **common}
        assert tokens(generate(llm, prompts, extra, length)) == stock[length], policy
    extra = {"kv_policy": "cab", **KEPT, **common}
    scored = generate(llm, prompts, extra, length)
    assert tokens(scored) == stock[length], "scoring alone changes nothing"
    check_idle(llm)


def test_the_pool_has_blocks_of_bytes(engines):
    """A token takes 128 bytes of keys and values for each layer and KV head, and 12 of scores."""
    llm = engines({}, **FP8)
    assert {cache.dtype for cache in worker_state().kv_caches.values()} == {torch.uint8}
    block = 6 * 3 * 16 * (128 + 12)
    most = ENGINE["kv_cache_memory_bytes"] / block
    assert 0.99 * most < connector_of(llm)._pool.num_gpu_blocks <= most


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("granularity", ANSWERED)
def test_blocks_go_and_runs_repeat(granularity, policy, engines, prompts):
    llm, length = engines({}, **FP8), ANSWERED[granularity]
    extra = {"kv_policy": policy, "kv_sparsity": 0.9, "kv_granularity": granularity}
    first = generate(llm, prompts, extra, length)
    for prompt, record in zip(prompts, records(first), strict=True):
        assert record["granularity"] == granularity
        assert "policy_error" not in record
        assert len(prompt) <= 200 or record["blocks_evicted"] > len(prompt) // 16 // 2
    check_idle(llm)
    again = generate(llm, prompts, extra, length)
    assert tokens(again) == tokens(first)
    assert [r["blocks_evicted"] for r in records(again)] == [
        r["blocks_evicted"] for r in records(first)
    ]
    check_idle(llm)


@pytest.mark.parametrize(
    "extra",
    [
        {"kv_policy": "keydiff"},
        {"kv_policy": "h2o", "kv_policy_args": {"value_weighted": True}},
        {"kv_policy": "h2o", "kv_policy_args": {"value_weighted": True, "selection": "layer"}},
    ],
    ids=["keydiff", "value-weighted", "value-weighted-by-layer"],
)
def test_rankings_that_read_keys_and_values(extra, engines, prompts):
    llm = engines({}, **FP8)
    made = generate(llm, prompts, {**extra, "kv_sparsity": 0.9, "kv_granularity": "token"}, 200)
    for prompt, record in zip(prompts, records(made), strict=True):
        assert "policy_error" not in record
        assert len(prompt) <= 200 or record["blocks_evicted"] > 0
    check_idle(llm)


def check_mass(llm, prompts, compared):
    extra = {"kv_policy": "cab", "kv_granularity": "token", **KEPT}
    generate(llm, prompts[-1:], extra, 2)
    assert len(compared) == 6, "a chunk in each layer"
    for given, expected in compared:
        # Ours and the reference add the same products in float32. FlashAttention, whose
        # log-sum-exp we divide by, adds 8-bit ones in its tensor cores, less exactly.
        torch.testing.assert_close(given, expected, rtol=2e-2, atol=1e-3)
        assert float(given.sum()) == pytest.approx(9 * len(prompts[-1]), rel=5e-3)
    check_idle(llm)


def test_scores_are_those_of_the_dequantised_cache(engines, prompts, compared):
    check_mass(engines({}, **FP8), prompts, compared)


def test_scales_count(scaled, prompts, compared):
    check_mass(scaled, prompts, compared)


def test_every_query_spreads_a_mass_of_1(engines, prompts):
    """In decodes, too, which are replayed graphs."""
    masses = list(mass_by_step(engines({}, **FP8).llm_engine, prompts[0]))
    assert masses
    assert masses == pytest.approx([6 * 9] * len(masses), rel=5e-3)


def test_every_query_spreads_a_mass_of_1_whatever_the_scales(scaled, prompts):
    masses = list(mass_by_step(scaled.llm_engine, prompts[0]))
    assert masses
    assert masses == pytest.approx([6 * 9] * len(masses), rel=5e-3)


def test_what_is_not_supported_is_refused(llama):
    from vllm import EngineArgs

    from vllm_plugins import EvictionConfigError, eviction_engine_args
    from vllm_plugins.refusals.engine import check_engine

    def check(**engine):
        eviction = eviction_engine_args(policy="h2o", sparsity=0.5)
        check_engine(
            EngineArgs(**{"model": llama, **ENGINE, **eviction, **engine}).create_engine_config()
        )

    check(kv_cache_dtype="fp8")
    check(kv_cache_dtype="fp8_e4m3")
    for engine, sentence in (
        ({"kv_cache_dtype": "fp8_e5m2"}, 'fp8_e5m2, which is not tested .* or "fp8" on CUDA'),
        ({"kv_cache_dtype": "fp8_per_token_head"}, "kv_cache_dtype is fp8_per_token_head"),
        ({**FP8, "dtype": "float16"}, 'use dtype="bfloat16"'),
        ({**FP8, "kv_cache_dtype_skip_layers": ["0"]}, "drop it .--kv-cache-dtype-skip-layers"),
    ):
        with pytest.raises(EvictionConfigError, match=sentence):
            check(**engine)
