"""Contexts longer than the pool: planned and admitted by the budget, not by the length."""

import math

import numpy as np
import pytest

from .conftest import TINY_BLOCK_BYTES, connector_of, make_tiny

POOL = 48
"""Blocks of 32 tokens: 1,536 tokens."""
ENGINE = {
    "max_model_len": 8192,
    "max_num_batched_tokens": 128,
    "long_prefill_token_threshold": 128,
}
SETTINGS = {"sparsity": 0.9, "request_budgets": "server"}


@pytest.fixture(scope="module")
def engines(long_llama, engine_slot):
    def make(num_blocks, **settings):
        def start():
            memory = {"kv_cache_memory_bytes": num_blocks * TINY_BLOCK_BYTES}
            return make_tiny(long_llama, {**ENGINE, **memory}, **SETTINGS, **settings)

        return engine_slot.get(repr((num_blocks, settings)), start)

    return make


@pytest.fixture(scope="module")
def prompts():
    return np.random.default_rng(3).integers(0, 256, size=(3, 6400)).tolist()


def answer(llm, prompts, extra=None, **options):
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=20, temperature=0.0, ignore_eos=True, extra_args=extra, **options
    )
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    connector = connector_of(llm)
    connector.check_integrity()
    assert connector._pool.get_num_free_blocks() == connector._pool.num_gpu_blocks - 1
    return outputs


def loss(output):
    """Nats of a prompt's tokens but the first."""
    own = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return -math.fsum(entry[token].logprob for token, entry in own)


@pytest.mark.parametrize(
    ("policy", "granularity", "sharing"),
    [("h2o", "token", True), ("cab", "block", False), ("streaming", "token", False)],
)
def test_a_context_of_four_pools_is_answered(policy, granularity, sharing, engines, prompts):
    """With the tokens and the perplexity of a pool that holds it whole."""
    made = []
    for blocks in (POOL, 600):
        llm = engines(blocks, policy=policy, granularity=granularity, prefix_caching=sharing)
        (output,) = answer(llm, prompts[:1], prompt_logprobs=0)
        record = output.kv_transfer_params["kv_eviction"]
        assert record["peak_pool_blocks"] <= POOL
        assert "policy_error" not in record
        assert record["preemptions"] == 0
        made.append((output.outputs[0].token_ids, loss(output)))
    assert len(prompts[0]) > 4 * POOL * 32
    assert made[0] == made[1]


def test_several_of_them_take_turns(engines, prompts):
    """Nobody hangs, and each answers as it does alone."""
    llm = engines(POOL, policy="h2o", granularity="token", prefix_caching=True)
    together = answer(llm, prompts)
    alone = [answer(llm, [prompt])[0] for prompt in prompts]
    assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in alone]


def test_a_request_that_keeps_more_is_refused(engines, prompts):
    from vllm.exceptions import VLLMValidationError

    llm = engines(POOL, policy="h2o", granularity="token", prefix_caching=True)
    for extra in (
        {"kv_policy": "dense"},
        {"kv_sparsity": 0.0},
        {"kv_sparsity": 0.5},
        {"kv_budget_tokens": 512},
    ):
        with pytest.raises(VLLMValidationError, match="holds every request to its own budget"):
            answer(llm, prompts[:1], extra)
    assert answer(llm, [prompts[0][:500]], {"kv_policy": "streaming", "kv_sparsity": 0.95})


def test_a_pool_below_the_plan_is_refused(long_llama, no_engine):
    """20 blocks of a budget, a slack, a chunk and one more do not fit into 16."""
    with pytest.raises(Exception, match="KV cache"):
        make_tiny(
            long_llama,
            {**ENGINE, "kv_cache_memory_bytes": 16 * TINY_BLOCK_BYTES},
            policy="h2o",
            **SETTINGS,
        )
