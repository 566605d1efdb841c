"""What an engine says that fits, against the plan that admits."""

from types import SimpleNamespace

import pytest

from vllm_plugins.capacity import Capacity
from vllm_plugins.config import EvictionConfig
from vllm_plugins.startup import capacity_lines, engine_lines

SERVER = {"policy": "h2o", "sparsity": 0.9, "request_budgets": "server"}


def capacity(num_blocks=60, max_model_len=8192, chunk=512, steps=1, **settings):
    return Capacity(
        config=EvictionConfig.parse({**SERVER, **settings}),
        max_model_len=max_model_len,
        block_size=32,
        num_blocks=num_blocks,
        in_flight_tokens=steps * chunk,
        num_steps_in_flight=steps,
    )


def test_a_request_holds_budget_slack_and_chunk():
    """26 blocks of 819.2 tokens, 1 of slack, 16 in flight, and the one that is begun."""
    it = capacity()
    assert it.pool_tokens == 1920
    assert it.budget_blocks == 26
    assert it.peak_blocks == 26 + 1 + 16 + 1
    assert capacity(steps=2).peak_blocks == 26 + 1 + 32 + 1


def test_a_short_request_holds_no_more_than_its_length():
    it = capacity(max_model_len=96)
    assert it.budget_blocks == it.peak_blocks == it.dense_blocks == 3


def test_requests_that_decode_share_one_chunk():
    """29 blocks each while they decode; 16 of the pool for the prompt in flight."""
    it = capacity(num_blocks=16 + 29 * 5)
    assert it.num_evicting == 5
    assert capacity(num_blocks=16 + 29 * 5 - 1).num_evicting == 4
    assert it.num_dense == 0
    assert capacity(num_blocks=512).num_dense == 2
    assert capacity(num_blocks=3).num_evicting == 0


@pytest.mark.parametrize("num_blocks", [40, 60, 333])
@pytest.mark.parametrize("steps", [1, 2])
def test_the_longest_context_is_the_last_that_the_plan_admits(num_blocks, steps):
    it = capacity(num_blocks=num_blocks, steps=steps, chunk=256)
    longest = it.longest_context
    if longest == it.pool_tokens:  # whatever fits whole is admitted
        assert it.config.planned_blocks(longest + 1, 32, steps * 256) > num_blocks
    else:
        assert it.config.planned_blocks(longest, 32, steps * 256) <= num_blocks
        assert it.config.planned_blocks(longest + 1, 32, steps * 256) > num_blocks


def test_an_absolute_budget_bounds_no_length():
    absolute = {"sparsity": 0, "budget_tokens": 512}
    assert capacity(**absolute).longest_context is None
    assert "any length" in capacity_lines(capacity(**absolute), 1)[-1]
    # Of a pool below budget and chunk only what fits whole is left.
    assert capacity(num_blocks=20, **absolute).longest_context == 640


def test_without_the_servers_budget_a_context_ends_with_the_pool():
    it = capacity(request_budgets="any", max_model_len=1024)
    assert it.longest_context == 1920
    *_, last = capacity_lines(it, 1)
    assert "max_model_len ends at 1,920, and more with request_budgets server" in last


def test_an_engine_says_how_it_steps_and_what_fits():
    scheduler = SimpleNamespace(max_num_batched_tokens=512, max_num_seqs=8, async_scheduling=True)
    engine = SimpleNamespace(
        scheduler_config=scheduler,
        compilation_config=SimpleNamespace(cudagraph_mode=SimpleNamespace(name="FULL", value=2)),
        device_config=SimpleNamespace(device_type="cuda"),
        cache_config=SimpleNamespace(block_size=32),
        model_config=SimpleNamespace(max_model_len=8192),
        max_in_flight_tokens=1024,
        max_concurrent_batches=2,
    )
    told = "\n".join(engine_lines(engine, EvictionConfig.parse(SERVER), 5 * 161, 5))
    assert "512 tokens (max_num_batched_tokens, the chunk) of 8 requests" in told
    assert "async scheduling is on, so two steps are in flight" in told
    assert "CUDA graphs FULL" in told
    assert "the pool holds 5,152 tokens, 161 blocks for each of 5 layer groups" in told
    assert "keeps 832 tokens, 26 blocks; while its prompt is computed it holds up to 60" in told
    assert "4 by the budget, whichever policy evicts; 0 under dense" in told

    scheduler.async_scheduling = False
    engine.device_config.device_type = "cpu"
    told = "\n".join(engine_lines(engine, EvictionConfig.parse({}), 512, 1))
    assert "async scheduling is off, so one step is in flight; no CUDA graphs" in told
    assert "fit at once: 2; the server evicts nothing by itself" in told
    assert "request_budgets" not in told
