"""The engine at token granularity against plain PyTorch: same tokens kept, same log-probs."""

import numpy as np
import pytest

from vllm_plugins.attention.state import worker_state
from vllm_plugins.ledger import Ledger

from ..packs import decisions_of, planned_packs
from . import token_oracle as oracle
from .conftest import connector_of

TOKENS = np.random.default_rng(3).integers(0, 256, size=700).tolist()
KEEP, BLOCK = 7, 32


def mean(token, now):
    return token.mass / (now - token.position)


def mass(token, now):
    return token.mass


def peak(token, now):
    return token.peak


def position(token, now):
    return token.position


def late(token, now):
    return token.late


def valued(token, now):
    return mean(token, now) * float(token.value.abs().sum())


CASES = {
    "h2o": ("h2o", {}, 0.2, oracle.ranked((mean, 1.0)), {}, {}),
    "h2o, chunks of 256": (
        "h2o",
        {},
        0.2,
        oracle.ranked((mean, 1.0)),
        {"engine": {"long_prefill_token_threshold": 256}},
        {"chunk": 256},
    ),
    "h2o, halves, no slack": (
        "h2o",
        {"recent": 0.5, "heavy": 0.5},
        0.5,
        oracle.ranked((mean, 1.0)),
        {"slack_tokens": 0},
        {"slack": 0},
    ),
    "h2o by sums": ("h2o", {}, 0.2, oracle.ranked((mass, 1.0)), {"score": "sum"}, {}),
    "h2o, decayed": (
        "h2o",
        {},
        0.2,
        oracle.ranked((mass, 1.0)),
        {"score": "decay", "score_half_life": 50},
        {"half_life": 50},
    ),
    "cab": ("cab", {}, 0.3, oracle.then_unlike_the_mean(mean, 0.2), {}, {}),
    "cab, bridges by peaks": (
        "cab",
        {"bridge_definition": "peak"},
        0.3,
        oracle.ranked((mean, 0.5), (peak, 0.2)),
        {},
        {},
    ),
    "cab, bridges by mass": (
        "cab",
        {"bridge_definition": "mass"},
        0.3,
        oracle.ranked((mean, 0.5), (mass, 0.2)),
        {},
        {},
    ),
    "streaming": ("streaming", {}, 1.0, oracle.ranked((position, 1.0)), {}, {}),
    "a prompt, then decodes": ("h2o", {}, 0.2, oracle.ranked((mean, 1.0)), {}, {"prompt": 384}),
    "a prompt, then every 4th query": (
        "cab",
        {"bridge_definition": "peak"},
        0.3,
        oracle.ranked((mean, 0.5), (peak, 0.2)),
        {"score_query_stride": 4},
        {"prompt": 384, "every": 4},
    ),
    "every 4th query of a prompt": (
        "cab",
        {"bridge_definition": "peak"},
        0.3,
        oracle.ranked((mean, 0.5), (peak, 0.2)),
        {"score_prompt_stride": 4},
        {"prompt": 384, "every": 1, "every_of_prompt": 4, "in_full": 24},
    ),
    "snapkv, every 4th query of a prompt": (
        "snapkv",
        {},
        0.2,
        oracle.pooled(late, 5),
        {"score_prompt_stride": 4},
        {"window": 32, "every_of_prompt": 4, "in_full": 24},
    ),
    "h2o, values weighted": (
        "h2o",
        {"value_weighted": True},
        0.2,
        oracle.ranked((valued, 1.0)),
        {},
        {},
    ),
    "h2o, one set a layer": (
        "h2o",
        {"selection": "layer"},
        0.2,
        oracle.together(mean),
        {},
        {},
    ),
    "h2o, one set": (
        "h2o",
        {"selection": "group"},
        0.2,
        oracle.together(mean, whole_model=True),
        {},
        {},
    ),
    "tova": ("tova", {}, 0.0, oracle.together(late), {}, {}),
    "tova, then decodes": (
        "tova",
        {},
        0.0,
        oracle.together(late),
        {},
        {"prompt": 384, "every": 8},
    ),
    "snapkv": ("snapkv", {}, 0.2, oracle.pooled(late, 5), {}, {"window": 32}),
    "snapkv, then decodes": (
        "snapkv",
        {},
        0.2,
        oracle.pooled(late, 5),
        {"score_query_stride": 4},
        {"prompt": 384, "every": 4, "window": 32},
    ),
    "keydiff": ("keydiff", {}, 0.0, oracle.unlike_the_mean(), {}, {}),
    "2 layer groups": (
        "h2o",
        {},
        0.2,
        oracle.ranked((mean, 1.0)),
        {"layer_groups": 2},
        {},
    ),
}


def settings(policy, parameters=None, **extra):
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=extra.pop("max_tokens", 1),
        temperature=0.0,
        prompt_logprobs=0,
        logprobs=0,
        ignore_eos=True,
        detokenize=False,
        extra_args={
            "kv_policy": policy,
            "kv_budget_tokens": KEEP * BLOCK,
            "kv_policy_args": parameters or {},
            "kv_granularity": "token",
            **extra,
        },
    )


def log_probs(output, tokens):
    num_prompt = len(output.prompt_token_ids)
    ours = [output.prompt_logprobs[i][tokens[i]].logprob for i in range(1, num_prompt)]
    answered = zip(output.outputs[0].logprobs, tokens[num_prompt:], strict=False)
    return ours + [entry[token].logprob for entry, token in answered]


def kept_tokens(record):
    """Of the last pack of each layer group: positions by layer and head, sorted."""
    from vllm.model_executor.models.utils import extract_layer_index

    scores = worker_state().tokens.position
    last = {entry["group"]: entry["region"] for entry in record["trace"]}
    kept = {}
    for group, region in last.items():
        for place, name in enumerate(worker_state().layers_of[group]):
            kept[extract_layer_index(name)] = [
                sorted(scores[place, region, head].flatten().tolist())
                for head in range(scores.shape[2])
            ]
    return [kept[layer] for layer in sorted(kept)]


@pytest.mark.parametrize("case", CASES)
def test_engine_equals_oracle(case, tiny_engines, tiny_llama, monkeypatch):
    policy, parameters, recent, choose, server, options = CASES[case]
    if "in_full" in options:
        monkeypatch.setattr("vllm_plugins.attention.cpu.SCORED_IN_FULL", options["in_full"])
    prompt = options.get("prompt", len(TOKENS))
    llm = tiny_engines(**server)
    params = settings(policy, parameters, max_tokens=max(1, len(TOKENS) - prompt))
    # A second request of other tokens: blocks of the two interleave in the pool.
    prompts = [{"prompt_token_ids": TOKENS[:prompt]}, {"prompt_token_ids": TOKENS[:prompt][::-1]}]
    out, _ = llm.generate(prompts, params, use_tqdm=False)
    answer = list(out.outputs[0].token_ids) if prompt < len(TOKENS) else []
    tokens = [*TOKENS[:prompt], *answer]
    expected = oracle.run(
        tiny_llama[1],
        tokens,
        keep=KEEP,
        block_size=BLOCK,
        recent=recent,
        choose=choose,
        **{"chunk": 64, "slack": 1, **options},
    )
    record = out.kv_transfer_params["kv_eviction"]
    assert record["decisions"] == expected.num_decisions * server.get("layer_groups", 1) > 0
    assert record["granularity"] == "token"
    assert kept_tokens(record) == expected.kept
    np.testing.assert_allclose(
        log_probs(out, tokens), expected.log_likelihoods[: len(tokens) - 1], atol=2e-4
    )


def test_decisions_with_a_step_in_flight_equal_the_oracle(tiny_engines, tiny_llama, monkeypatch):
    """Asynchronous scheduling, which vLLM has on GPUs only: a chunk that is still computed when
    the scheduler decides has no candidates, but its queries count."""
    decide = Ledger.decide

    def late(ledger, request_id, group, num_processed_tokens, *rest):
        return decide(ledger, request_id, group, max(0, num_processed_tokens - 64), *rest)

    monkeypatch.setattr(Ledger, "decide", late)
    llm = tiny_engines()
    prompts = [{"prompt_token_ids": TOKENS}, {"prompt_token_ids": TOKENS[::-1]}]
    with planned_packs() as packs:
        out, _ = llm.generate(prompts, settings("cab"), use_tqdm=False)
    record = out.kv_transfer_params["kv_eviction"]
    decisions = decisions_of(record, packs)
    assert all(scored - processed == 64 for scored, processed in decisions.items())
    expected = oracle.run(
        tiny_llama[1],
        TOKENS,
        keep=KEEP,
        block_size=BLOCK,
        recent=0.3,
        choose=oracle.then_unlike_the_mean(mean, 0.2),
        chunk=64,
        slack=1,
        decisions=decisions,
    )
    assert record["decisions"] == expected.num_decisions > 0
    assert kept_tokens(record) == expected.kept
    np.testing.assert_allclose(
        log_probs(out, TOKENS), expected.log_likelihoods[: len(TOKENS) - 1], atol=2e-4
    )


def test_heads_keep_tokens_of_their_own(tiny_engines):
    llm = tiny_engines()
    (out,) = llm.generate([{"prompt_token_ids": TOKENS}], settings("h2o"), use_tqdm=False)
    heads = [h for layer in kept_tokens(out.kv_transfer_params["kv_eviction"]) for h in layer]
    assert len({str(kept) for kept in heads}) == len(heads)
    assert all(kept[:4] == [0, 1, 2, 3] for kept in heads), "sinks"


def test_sparsity_0_equals_stock(tiny_engines):
    llm = tiny_engines()
    prompt = [{"prompt_token_ids": TOKENS}]
    (none,) = llm.generate(prompt, settings("h2o", kv_budget_tokens=1024), use_tqdm=False)
    params = settings("dense")
    params.extra_args = {"kv_policy": "dense"}
    (dense,) = llm.generate(prompt, params, use_tqdm=False)
    assert log_probs(none, TOKENS) == log_probs(dense, TOKENS)


def test_both_granularities_share_an_engine(tiny_engines):
    """Neighbours of the other granularity, and other policies, change nothing of an answer."""
    llm = tiny_engines()
    cases = [
        settings("h2o", max_tokens=40),
        settings("h2o", max_tokens=40, kv_granularity="block"),
        settings("cab", max_tokens=40),
        settings("random", max_tokens=40),
        settings("streaming", max_tokens=40, kv_granularity="block"),
        settings("key_norm", max_tokens=40),
    ]
    prompts = [{"prompt_token_ids": np.roll(TOKENS, 17 * i).tolist()} for i in range(len(cases))]
    dense = settings("dense", max_tokens=40)
    dense.extra_args = {"kv_policy": "dense"}
    # A request with no neighbour at all is given larger chunks, so each has one that never evicts.
    alone = [
        llm.generate([prompt, prompts[0]], [params, dense], use_tqdm=False)[0]
        for prompt, params in zip(prompts, cases, strict=True)
    ]
    together = llm.generate(prompts, cases, use_tqdm=False)
    for quiet, busy in zip(alone, together, strict=True):
        assert quiet.outputs[0].token_ids == busy.outputs[0].token_ids
        assert busy.kv_transfer_params["kv_eviction"]["blocks_evicted"] > 0
        assert "policy_error" not in busy.kv_transfer_params["kv_eviction"]
    assert connector_of(llm).ledger.requests == {}


def test_preempted_requests_answer_the_same(tiny_engines):
    """A pool too small for all: packs planned for blocks that went must not be carried out."""

    def answers(engine):
        llm = tiny_engines(engine=engine)
        prompts = [{"prompt_token_ids": np.roll(TOKENS, 31 * i)[:300].tolist()} for i in range(8)]
        params = settings("cab", max_tokens=300)
        return llm.generate(prompts, params, use_tqdm=False)

    calm = answers({})
    crowded = answers({"kv_cache_memory_bytes": 5 << 20})
    preempted = sum(o.kv_transfer_params["kv_eviction"]["preemptions"] for o in crowded)
    assert preempted > 0
    for a, b in zip(calm, crowded, strict=True):
        assert len(b.outputs[0].token_ids) == 300
        if not b.kv_transfer_params["kv_eviction"]["preemptions"]:
            assert a.outputs[0].token_ids == b.outputs[0].token_ids


def test_a_ranking_that_fails_does_not_take_the_engine_down(tiny_engines, monkeypatch):
    from vllm_plugins.policies import Policy, TokenRule, registry

    def broken(tokens, left):
        raise RuntimeError("out of ideas")

    rule = TokenRule(recent=0.2, ranked=((broken, 1.0),))
    policy = Policy(name="broken", tokens=lambda parameters: rule)
    monkeypatch.setitem(registry._BUILT_IN, "broken", policy)
    registry.get_policy.cache_clear()
    llm = tiny_engines()
    params = settings("broken", max_tokens=8)
    (out,) = llm.generate([{"prompt_token_ids": TOKENS}], params, use_tqdm=False)
    assert len(out.outputs[0].token_ids) == 8
    record = out.kv_transfer_params["kv_eviction"]
    assert record["policy_error"] == "RuntimeError: out of ideas"
    registry.get_policy.cache_clear()
