"""Blocks are conserved at every step, whatever happens; freed blocks serve other requests."""

import gc
import weakref

import numpy as np
import pytest

from vllm_plugins.attention.state import worker_state
from vllm_plugins.policies import policy_names

from .conftest import TINY_BLOCK_BYTES, connector_of, end, make_tiny
from .traffic import add, forms_of, random_traffic


def held_by_request(connector):
    held = {}
    for manager in connector._managers:
        for request_id, blocks in manager.req_to_blocks.items():
            ids = {b.block_id for b in blocks if not b.is_null}
            held[request_id] = held.get(request_id, set()) | ids
    return held


@pytest.mark.parametrize("layer_groups", [1, 2])
def test_random_arrivals_aborts_and_preemptions(layer_groups, tiny_engines):
    """``check_integrity`` runs inside the engine at every step, and here after it. Requests that
    keep their cache answer as they do alone, whatever their neighbours lose."""
    # Some 65 blocks of 32 tokens for all layers: too few for eight requests of up to 600 tokens.
    llm = tiny_engines({"kv_cache_memory_bytes": 70 * TINY_BLOCK_BYTES}, layer_groups=layer_groups)
    connector = connector_of(llm)
    engine = llm.llm_engine
    rng = np.random.default_rng(11)
    policies = [*policy_names(), "forman"]
    unaffected = {}

    def request(place):
        policy = policies[place % len(policies)]
        extra = {"kv_policy": policy}
        if policy == "forman":
            extra = {"kv_policy": "cab", "kv_policy_args": {"bridge_definition": "forman"}}
        if policy != "dense":
            extra["kv_sparsity"] = float(rng.choice([0.0, 0.3, 0.5, 0.9]))
        if policy not in ("dense", "forman"):
            extra["kv_granularity"] = str(rng.choice(forms_of(policy)))
        length = int(rng.integers(1, 500))
        tokens = rng.integers(0, 256, size=length).tolist()
        max_tokens = int(rng.integers(1, 100))
        if not extra.get("kv_sparsity"):
            unaffected[f"r{place}"] = (tokens, max_tokens)
        return {"tokens": tokens, "extra": extra, "max_tokens": max_tokens}

    outputs = random_traffic(llm, rng, 90, request)
    answers = {name: list(output.outputs[0].token_ids) for name, output in outputs.items()}
    records = [output.kv_transfer_params["kv_eviction"] for output in outputs.values()]
    assert len(records) > 30
    assert sum(r["preemptions"] for r in records) > 0, "the pool was meant to be too small"
    assert sum(r["blocks_evicted"] for r in records) > 100
    assert not any("policy_error" in r or "refused_settings" in r for r in records)
    assert connector._pool.get_num_free_blocks() == connector._pool.num_gpu_blocks - 1
    assert connector.ledger.requests == {}
    assert connector.ledger.take_evictions() == {}
    compared = [name for name in unaffected if name in answers]
    assert len(compared) > 8
    for name in compared:
        add(llm, name, unaffected[name][0], {}, unaffected[name][1])
        while engine.has_unfinished_requests():
            alone = engine.step()
        assert list(alone[0].outputs[0].token_ids) == answers[name], name


def test_freed_blocks_serve_other_requests(tiny_engines):
    llm = tiny_engines()
    connector = connector_of(llm)
    rng = np.random.default_rng(5)
    extra = {"kv_policy": "h2o", "kv_sparsity": 0.9}
    first = add(llm, "first", rng.integers(0, 256, size=900).tolist(), extra, 50)
    once_held: set[int] = set()
    for _ in range(5):
        llm.llm_engine.step()
        held = held_by_request(connector)[first]
        once_held |= held
    freed = once_held - held
    assert len(freed) > 10, "blocks were freed while their request goes on"
    second = add(llm, "second", rng.integers(0, 256, size=300).tolist(), extra, 1)
    llm.llm_engine.step()
    now = held_by_request(connector)
    assert now[second] & freed, "another request got some of them"
    assert first in now, "which still runs"
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()


def test_a_pool_too_small_for_dense_serves_evicting_requests_together(tiny_engines):
    """Two prompts of 29 blocks in a pool of 44: nobody waits, nobody is preempted."""
    from vllm import SamplingParams

    llm = tiny_engines({"kv_cache_memory_bytes": 45 * TINY_BLOCK_BYTES})
    prompts = np.random.default_rng(5).integers(0, 256, size=(2, 900)).tolist()
    params = SamplingParams(
        max_tokens=8,
        ignore_eos=True,
        detokenize=False,
        extra_args={"kv_policy": "h2o", "kv_sparsity": 0.9},
    )
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    records = [output.kv_transfer_params["kv_eviction"] for output in outputs]
    assert connector_of(llm)._pool.num_gpu_blocks <= 45
    assert [r["preemptions"] for r in records] == [0, 0]
    # 15 chunks of 64 tokens and 7 single tokens each: they ran side by side from the start.
    assert [r["num_steps"] for r in records] == [22, 22]


def test_a_preempted_request_gives_the_same_answer(tiny_engines):
    """Preemption starts a request over; with the same decisions it ends the same."""
    from vllm import SamplingParams

    prompt = np.random.default_rng(9).integers(0, 256, size=(3, 400)).tolist()
    params = SamplingParams(
        max_tokens=200,
        temperature=0.0,
        ignore_eos=True,
        detokenize=False,
        extra_args={"kv_policy": "dense"},
    )
    outputs = []
    for blocks in (200, 46):
        llm = tiny_engines({"kv_cache_memory_bytes": blocks * TINY_BLOCK_BYTES})
        made = llm.generate([{"prompt_token_ids": p} for p in prompt], params, use_tqdm=False)
        preempted = sum(o.kv_transfer_params["kv_eviction"]["preemptions"] for o in made)
        assert (preempted > 0) == (blocks == 46)
        outputs.append([o.outputs[0].token_ids for o in made])
    assert outputs[0] == outputs[1]


def test_an_ended_engine_holds_on_to_no_cache(tiny_llama, no_engine):
    """A sweep starts the next engine in the same process, and needs that memory."""
    llm = make_tiny(tiny_llama[0], policy="h2o", sparsity=0.9, granularity="token")
    state = worker_state()
    kept = [weakref.ref(array) for array in (*state.kv_caches.values(), state.tokens.position)]
    prompt = {"prompt_token_ids": list(range(250)) * 2}
    assert llm.generate([prompt], use_tqdm=False)
    end(llm)
    del llm
    gc.collect()
    assert state.kv_caches == {}
    assert [reference() for reference in kept] == [None] * len(kept)
