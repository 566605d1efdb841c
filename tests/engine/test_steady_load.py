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
    llm = tiny_engines({"kv_cache_memory_bytes": 70 * TINY_BLOCK_BYTES}, layer_groups=1)
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
    # What was aborted gave its blocks back, and the next load meets an empty engine.
    assert engine.gauges().kv_blocks_used == 0
    assert engine.gauges().running == 0
    assert not llm.llm_engine.has_unfinished_requests()
    connector_of(llm).check_integrity()
