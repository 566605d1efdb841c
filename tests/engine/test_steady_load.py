"""A closed loop on vLLM: what it tells agrees, and nothing of it is left behind."""

import pytest

from harness.resources.steady_engine import VllmSteadyEngine
from harness.resources.steady_loop import measure
from harness.study.steady_load import SteadyLoad

from .conftest import TINY_BLOCK_BYTES, connector_of

LOAD = SteadyLoad(8, 64, (8, 800), settle_seconds=0.5, measured_seconds=2.0)
POOL_TOKENS = 65 * 32


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kv_policy": "streaming", "kv_sparsity": 0.5},
        {"kv_policy": "h2o", "kv_sparsity": 0.5, "kv_granularity": "token"},
    ],
)
def test_a_loop_is_measured_and_stopped(settings, tiny_engines):
    from vllm import SamplingParams

    options = {"kv_cache_memory_bytes": 70 * TINY_BLOCK_BYTES, "disable_log_stats": False}
    llm = tiny_engines(options, layer_groups=1)
    engine = VllmSteadyEngine(llm, POOL_TOKENS, settings, dict)
    record = measure(LOAD, 0, settings, engine)
    assert record["num_aged"] == (8 if settings else 6)
    assert 0 < record["running"] <= 8
    assert 0 < record["kv_blocks_used"] <= record["kv_blocks"]
    assert record["output_tokens"] == round(record["steps"] * record["tokens_per_step"])
    assert record["tokens_per_step"] <= 8
    assert record["split"] is None
    assert record["requests_ended"] > 0, "each is replaced"
    if settings:
        assert record["eviction"]["blocks_evicted"] > 0
        assert record["eviction"]["policy_errors"] == 0
    # What was aborted gives its blocks back before the next request begins.
    params = SamplingParams(max_tokens=2, detokenize=False)
    llm.generate([{"prompt_token_ids": [1, 2, 3]}], params, use_tqdm=False)
    connector = connector_of(llm)
    connector.check_integrity()
    assert connector._pool.get_num_free_blocks() == connector._pool.num_gpu_blocks - 1
