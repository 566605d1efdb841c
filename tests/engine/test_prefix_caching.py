"""Prefixes are shared, and nobody's answer depends on who else holds them."""

import numpy as np
import pytest

from .conftest import TINY_BLOCK_BYTES, connector_of
from .traffic import add, families, random_traffic

ONE_CHUNK = {"long_prefill_token_threshold": 1024, "max_num_batched_tokens": 4096}
BY_POSITION = [("streaming", "block"), ("streaming", "token"), ("random", "block")]
BY_POSITION += [("random", "token"), ("keydiff", "token"), ("key_norm", "token")]
BY_LAST_QUERIES = [("snapkv", "token"), ("tova", "token")]
BY_ATTENTION = [("h2o", "block"), ("h2o", "token"), ("cab", "block"), ("cab", "token")]


@pytest.fixture(scope="module")
def prompts():
    """Prompts that share 400, 300, 200, 400, 64 and 33 tokens with the first one."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, size=400).tolist()
    lengths = ((400, 50), (300, 100), (200, 40), (400, 90), (64, 64), (33, 50))
    return [base[:shared] + rng.integers(0, 256, size=own).tolist() for shared, own in lengths]


def generate(llm, prompts, extra, max_tokens=40, **options):
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        extra_args=extra,
        **{"temperature": 0.0, **options},
    )
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    check_idle(llm)
    return outputs


def check_idle(llm):
    connector = connector_of(llm)
    connector.check_integrity()
    assert connector._pool.get_num_free_blocks() == connector._pool.num_gpu_blocks - 1
    assert not connector.ledger.sharing._exact


def answers(outputs):
    return [list(output.outputs[0].token_ids) for output in outputs]


def settings(policy, granularity):
    extra = {"kv_policy": policy, "kv_granularity": granularity}
    return extra if policy == "dense" else {**extra, "kv_sparsity": 0.7}


def test_what_does_not_ask_attention_answers_as_without_sharing(prompts, tiny_engines):
    """Nor does what looks at the last queries alone: for it these are always computed. Whoever asks
    nothing of attention finds what a request of stock vLLM would, all but the last token."""
    forms = [("dense", "block"), *BY_POSITION, *BY_LAST_QUERIES]
    made = []
    for sharing in (False, True):
        llm = tiny_engines(ONE_CHUNK, prefix_caching=sharing)
        for form in forms:
            together = generate(llm, prompts, settings(*form))
            alone = [generate(llm, [prompt], settings(*form))[0] for prompt in prompts]
            made.append((answers(together), answers(alone)))
            cached = [output.num_cached_tokens for output in together + alone]
            # Together, whoever shares with the first one waits a step for it.
            expected = [0, 288, 192, 384, 64, 32, 448, 384, 224, 480, 96, 64]
            if form in BY_LAST_QUERIES:
                expected[6:] = [416, 352, 192, 448, 96, 32]
            assert cached == (expected if sharing else [0] * 12), form
            if form != ("dense", "block"):
                records = [o.kv_transfer_params["kv_eviction"] for o in together]
                assert sum(record["blocks_evicted"] for record in records) > 20
                assert [record["cached_tokens"] for record in records] == cached[:6]
            assert llm.reset_prefix_cache()
    assert made[: len(forms)] == made[len(forms) :]


def test_layer_groups_answer_as_without_sharing(prompts, tiny_engines):
    """Groups share the memory of blocks: what one packs, the next one may copy into."""
    made = []
    for sharing in (False, True):
        llm = tiny_engines(ONE_CHUNK, prefix_caching=sharing, layer_groups=2)
        extra = {**settings("random", "token"), "kv_sparsity": 0.5}
        outputs = generate(llm, prompts, extra, 300)
        assert any(output.num_cached_tokens for output in outputs) == sharing
        made.append(answers(outputs))
        assert llm.reset_prefix_cache()
    assert made[0] == made[1]


@pytest.mark.parametrize(("policy", "granularity"), BY_ATTENTION)
def test_an_answer_does_not_depend_on_who_holds_the_prefix(
    policy, granularity, prompts, tiny_engines
):
    """Computed by a request that kept its cache, by one that packed it, or held by another that
    still runs: a hit of the same length gives the same answer."""
    llm = tiny_engines(ONE_CHUNK, prefix_caching=True)
    extra = settings(policy, granularity)
    made = []
    for before in ({"kv_policy": "dense"}, settings("h2o", "token"), settings("cab", "block")):
        generate(llm, prompts[:1], before)
        taken = generate(llm, prompts[3:4], extra)  # nobody holds the blocks any more
        assert taken[0].kv_transfer_params["kv_eviction"]["cached_tokens"] == 384
        made.append(answers(taken))
        assert llm.reset_prefix_cache()
        # The first one goes on for long after it was packed.
        engine = llm.llm_engine
        add(llm, "first", prompts[0], before, 200)
        while not connector_of(llm).ledger.requests or not _decodes(llm):
            engine.step()
        add(llm, "second", prompts[3], extra, 40)
        done = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    done[output.request_id] = output
        assert done["second"].kv_transfer_params["kv_eviction"]["cached_tokens"] == 384
        made.append(answers([done["second"]]))
        check_idle(llm)
        assert llm.reset_prefix_cache()
    assert all(answer == made[0] for answer in made)


def _decodes(llm):
    requests = connector_of(llm).ledger.requests.values()
    return all(state.request.num_computed_tokens > 460 for state in requests)


@pytest.mark.parametrize("granularity", ["block", "token"])
def test_what_a_request_evicts_stays_for_others(granularity, prompts, tiny_engines):
    """Its blocks go, the cache keeps them: whoever comes next computes its own part only, and
    finds what was there, though the request has packed its own."""
    llm = tiny_engines(ONE_CHUNK, prefix_caching=True)
    whole = generate(llm, prompts, {"kv_policy": "dense"})
    assert llm.reset_prefix_cache()
    generate(llm, prompts[:1], settings("h2o", granularity), 150)
    again = generate(llm, prompts, {"kv_policy": "dense"})
    assert [output.num_cached_tokens for output in again] == [448, 288, 192, 384, 64, 32]
    assert answers(again) == answers(whole)


def test_samples_of_a_prompt_compute_it_once(prompts, tiny_engines):
    llm = tiny_engines(ONE_CHUNK, prefix_caching=True)
    assert llm.reset_prefix_cache()
    extra = settings("h2o", "token")
    (output,) = generate(llm, prompts[:1], extra, n=4, temperature=1.0, seed=1)
    records = output.kv_transfer_params["kv_eviction"]
    assert sorted(record["cached_tokens"] for record in records) == [0, 416, 416, 416]
    assert len({tuple(sample.token_ids) for sample in output.outputs}) == 4


def num_answered_as_alone(llm, asked, outputs):
    """Of the requests that kept all their cache, and each has to."""
    compared = 0
    for name, output in outputs.items():
        request = asked[name]
        if request["extra"].get("kv_sparsity", 0.0) == 0.0:
            assert llm.reset_prefix_cache()
            dense = {"kv_policy": "dense"}
            alone = generate(llm, [request["tokens"]], dense, request["max_tokens"])
            assert answers(alone) == answers([output]), name
            compared += 1
    return compared


@pytest.mark.parametrize("layer_groups", [1, 2])
def test_random_arrivals_with_shared_prefixes(layer_groups, tiny_engines):
    """A pool too small, aborts, preemptions, every policy: blocks are conserved at every step, and
    who keeps all its cache answers as it does alone, whatever others did to the same prefix."""
    llm = tiny_engines(
        {"kv_cache_memory_bytes": 42 * TINY_BLOCK_BYTES},
        layer_groups=layer_groups,
        prefix_caching=True,
    )
    rng = np.random.default_rng(12)
    asked, make = families(rng, 256, 400, 100, 100)
    outputs = random_traffic(llm, rng, 120, make)
    check_idle(llm)
    records = [output.kv_transfer_params["kv_eviction"] for output in outputs.values()]
    assert len(records) > 60
    assert sum(record["preemptions"] for record in records) > 0
    assert sum(record["blocks_evicted"] for record in records) > 100
    assert sum(record["cached_tokens"] for record in records) > 1000
    assert not any("policy_error" in record for record in records)
    assert num_answered_as_alone(llm, asked, outputs) > 15
