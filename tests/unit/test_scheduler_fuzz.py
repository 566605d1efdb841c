"""Random traffic through vLLM's scheduler: whoever reads a block finds its own tokens there."""

import numpy as np
import pytest
from transformers import LlamaConfig

from vllm_plugins.manager import EvictableManager
from vllm_plugins.policies import get_policy
from vllm_plugins.prefix_sharing import PrefixSharing

from ..engine.conftest import TINY
from .simulated_scheduler import SchedulerOverMemory
from .simulated_worker import BLOCK_SIZE, VOCABULARY, Memory

NUM_REQUESTS = 60
MOST_AT_ONCE = 14
POLICIES = ("h2o", "cab", "streaming", "random", "key_norm", "snapkv", "keydiff", "tova")
GRANULARITIES = {
    name: ["block"] * (get_policy(name).select is not None)
    + ["token"] * (get_policy(name).tokens is not None)
    for name in POLICIES
}


@pytest.fixture(scope="module")
def tiny_config(tmp_path_factory):
    """Folder of a model's configuration. There are no weights: nothing is computed."""
    folder = tmp_path_factory.mktemp("tiny-config")
    LlamaConfig(**TINY, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return str(folder)


def random_settings(rng):
    """Of a request: dense, or some policy's."""
    policy = str(rng.choice(["dense", *POLICIES]))
    if policy == "dense":
        return {"kv_policy": policy}
    return {
        "kv_policy": policy,
        "kv_sparsity": float(rng.choice([0.0, 0.5, 0.9])),
        "kv_granularity": str(rng.choice(GRANULARITIES[policy])),
    }


def random_tokens(rng, number):
    return rng.integers(0, VOCABULARY, size=number).tolist()


def run_random_traffic(
    folder, layer_groups, blocks_per_group, priority, asynchronous, seed, window_groups=0
):
    """Requests of two families of prompts arrive, are preempted and aborted; while they run, the
    prefix cache is reset, which vLLM does not do with steps in flight. What the plans asked for."""
    rng = np.random.default_rng(seed)
    num_blocks = blocks_per_group * (layer_groups + window_groups) + 1
    simulation = SchedulerOverMemory(
        folder, num_blocks, layer_groups, asynchronous, priority, window_groups
    )
    scheduler = simulation.scheduler
    roots = [random_tokens(rng, 12 * BLOCK_SIZE) for _ in range(2)]
    num_arrived = 0
    while num_arrived < NUM_REQUESTS or simulation.is_busy:
        live = sorted(scheduler.requests)
        if num_arrived < NUM_REQUESTS and len(live) < MOST_AT_ONCE and rng.random() < 0.5:
            shared = roots[rng.integers(2)][: rng.integers(1, 12 * BLOCK_SIZE)]
            prompt = shared + random_tokens(rng, rng.integers(1, 60))
            max_tokens, level = int(rng.integers(1, 150)), int(rng.integers(3))
            simulation.add(prompt, max_tokens, random_settings(rng), level if priority else 0)
            num_arrived += 1
        if live and rng.random() < 0.03:
            simulation.abort(str(rng.choice(live)))
        if not asynchronous and rng.random() < 0.01:
            assert scheduler.reset_prefix_cache(reset_running_requests=True)
        simulation.step()
    simulation.check_empty()
    return simulation.worker.counts


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    ("layer_groups", "window_groups", "blocks_per_group", "priority"),
    [
        (1, 0, 40, False),
        (1, 0, 34, True),
        (2, 0, 40, True),
        (2, 0, 34, False),
        (4, 0, 40, False),
        (4, 0, 34, True),
        (1, 1, 34, False),
        (1, 3, 34, True),
        (2, 2, 40, False),
    ],
)
def test_random_requests_share_prefixes_and_lose_blocks(
    layer_groups, window_groups, blocks_per_group, priority, asynchronous, seed, tiny_config
):
    counts = run_random_traffic(
        tiny_config, layer_groups, blocks_per_group, priority, asynchronous, seed, window_groups
    )
    for kind in ("copies", "packs", "adopted blocks", "evicted blocks", "preemptions"):
        assert counts[kind], f"no {kind}: this case tests less than it says"


def no_copy(monkeypatch):
    """A worker does not make the copies that it was told to."""
    monkeypatch.setattr(Memory, "copy", lambda memory, block, copy: None)


def packed_where_shared(monkeypatch):
    """A request packs into blocks that others hold, or that the cache offers."""

    def own(manager, request_id, positions):
        return [manager.req_to_blocks[request_id][i].block_id for i in positions]

    monkeypatch.setattr(EvictableManager, "_own", own)


def hashed_after_eviction(monkeypatch):
    """What saw an evicted cache is offered as if it had seen all."""
    monkeypatch.setattr(PrefixSharing, "first_eviction", lambda sharing, name, num_tokens: None)


@pytest.mark.parametrize("fault", [no_copy, packed_where_shared, hashed_after_eviction])
def test_a_fault_is_noticed(fault, tiny_config, monkeypatch):
    """Shared blocks that are corrupted."""
    fault(monkeypatch)
    with pytest.raises(AssertionError, match="block"):
        run_random_traffic(tiny_config, 1, 34, False, False, 0)
