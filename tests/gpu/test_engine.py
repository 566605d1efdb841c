"""Engines on a GPU, default settings: full CUDA graphs, async scheduling, chunked prefill.

Models are random Llamas with SmolLM2's head shape, made here. Requests of both granularities share
an engine.
"""

import os

import pytest

from .engines import ENGINE, NEEDS_GPU, POLICIES, check_idle, generate, records, tokens
from .mass import mass_by_step

pytestmark = NEEDS_GPU

ANSWERED = {"block": 64, "token": 200}
"""Tokens of an answer."""


@pytest.mark.parametrize("granularity", ANSWERED)
def test_sparsity_0_gives_stocks_tokens(granularity, stock, engines, prompts):
    llm, length = engines({}), ANSWERED[granularity]
    common = {"kv_granularity": granularity}
    for policy in POLICIES:
        extra = {"kv_policy": policy, "kv_sparsity": 0, **common}
        assert tokens(generate(llm, prompts, extra, length)) == stock[length], policy
    extra = {"kv_policy": "cab", "kv_budget_tokens": 10**7, **common}
    scored = generate(llm, prompts, extra, length)
    assert tokens(scored) == stock[length], "scoring alone changes nothing"
    check_idle(llm)


def test_scores_are_the_attention_mass(engines, prompts):
    """Every query of every layer spreads a mass of 1 per head over the blocks it sees."""
    llm = engines({})
    masses = list(mass_by_step(llm.llm_engine, prompts[0]))
    assert masses
    assert masses == pytest.approx([6 * 9] * len(masses), rel=2e-3)
    check_idle(llm)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("granularity", ANSWERED)
def test_budgets_hold_and_runs_repeat(granularity, policy, engines, prompts):
    llm, length = engines({}), ANSWERED[granularity]
    extra = {"kv_policy": policy, "kv_sparsity": 0.9, "kv_granularity": granularity}
    first = generate(llm, prompts, extra, length)
    for prompt, record in zip(prompts, records(first), strict=True):
        assert record["granularity"] == granularity
        assert "policy_error" not in record
        # Chunks of up to 1,024 tokens; reports lag by the step in flight. By token, the slack too.
        if granularity == "block":
            keep = max(4, -(-len(prompt) // 160))
            most, least = keep + 2 * 1024 // 16 + 2, (len(prompt) + 40) // 16 - keep - 1
        else:
            keep = max(4, -(-(len(prompt) + length) // 160))
            most, least = keep + 2 * 1024 // 16 + 6, (len(prompt) + 160) // 16 - keep - 5
        assert record["peak_blocks"] <= most
        if len(prompt) > 200:
            assert record["blocks_evicted"] >= least
    check_idle(llm)
    again = generate(llm, prompts, extra, length)
    assert tokens(again) == tokens(first)
    assert [r["blocks_evicted"] for r in records(again)] == [
        r["blocks_evicted"] for r in records(first)
    ]


def test_a_bad_request_does_not_end_the_engine(engines, prompts):
    from vllm.exceptions import VLLMValidationError

    llm = engines({})
    with pytest.raises(VLLMValidationError, match="unknown policy"):
        generate(llm, prompts[:1], {"kv_policy": "h20"}, 64)
    forman = {"kv_policy_args": {"bridge_definition": "forman"}}
    extra = {"kv_policy": "cab", "kv_sparsity": 0.5, **forman}
    with pytest.raises(VLLMValidationError, match="gathered on CPUs only"):
        generate(llm, prompts[:1], extra, 64)
    assert len(tokens(generate(llm, prompts[:1], {}, 64))[0]) == 64
    check_idle(llm)


@pytest.mark.parametrize("layer_groups", [3, 6])
def test_layer_groups(layer_groups, stock, engines, prompts):
    llm = engines({"layer_groups": layer_groups})
    extra = {"kv_policy": "h2o", "kv_sparsity": 0}
    assert tokens(generate(llm, prompts, extra, 64)) == stock[64]
    made = records(generate(llm, prompts, {"kv_policy": "h2o", "kv_sparsity": 0.9}, 64))
    assert all(r["blocks_evicted"] > 0 for r in made if r["num_steps"] > 80)
    check_idle(llm)


def test_what_is_not_supported_is_refused(llama):
    from vllm import EngineArgs

    from vllm_plugins import EvictionConfigError, eviction_engine_args
    from vllm_plugins.refusals.engine import check_engine

    def check(engine=None, **settings):
        arguments = {"model": llama, **ENGINE, **eviction_engine_args(**settings), **(engine or {})}
        check_engine(EngineArgs(**arguments).create_engine_config())

    check(policy="h2o", sparsity=0.5)
    for engine, settings, sentence in (
        ({"kv_cache_dtype": "fp8_e5m2"}, {}, 'use kv_cache_dtype="auto"'),
        ({"block_size": 48}, {}, "16, 32, 64 or 128"),
        ({"attention_backend": "FLASH_ATTN"}, {}, "pass attention_backend"),
        (
            {},
            {
                "policy": "cab",
                "sparsity": 0.5,
                "policy_args": {"cab": {"bridge_definition": "forman"}},
            },
            "bridge_definition median",
        ),
    ):
        with pytest.raises(EvictionConfigError, match=sentence):
            check(engine, **settings)


assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0", "tests look inside the engine"
