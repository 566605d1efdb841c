"""The engine against token-level eviction in plain PyTorch: same kept sets, same log-probs."""

import numpy as np
import pytest

from vllm_plugins.config import EvictionConfig
from vllm_plugins.policies.cab import cab

from . import oracle

TOKENS = np.random.default_rng(3).integers(0, 256, size=600).tolist()
KEEP = 7  # blocks of 32

CASES = {
    "h2o": ({}, "h2o", {}, {}),
    "h2o in 2 layer groups": ({"layer_groups": 2}, "h2o", {}, {"layer_groups": 2}),
    "h2o in a group per layer": ({"layer_groups": 4}, "h2o", {}, {"layer_groups": 4}),
    "cab median": ({}, "cab", {}, {}),
    "cab forman, 2 groups": (
        {"layer_groups": 2},
        "cab",
        {"bridge_definition": "forman"},
        {"layer_groups": 2},
    ),
    "h2o, decayed": ({"score": "decay", "score_half_life": 50}, "h2o", {}, {"half_life": 50}),
    "h2o, last 16 queries": ({"score_queries": 16}, "h2o", {}, {"window": 16}),
    "h2o, decayed, last 16": (
        {"score": "decay", "score_half_life": 50, "score_queries": 16},
        "h2o",
        {},
        {"half_life": 50, "window": 16},
    ),
    "every 2nd layer of 2 groups": (
        {"layer_groups": 2, "score_layer_stride": 2},
        "h2o",
        {},
        {"layer_groups": 2, "layer_stride": 2},
    ),
    "a prompt, then decodes, as a server scores them": (
        {
            "score_query_stride": EvictionConfig().score_query_stride,
            "score_layer_stride": EvictionConfig().score_layer_stride,
        },
        "h2o",
        {},
        {"every": 8, "layer_stride": 4, "prompt": 384},
    ),
    "every 4th query of a prompt's last 40, the newest 12 in full": (
        {"score_prompt_stride": 4, "score_queries": 40},
        "h2o",
        {},
        {"window": 40, "every_of_prompt": 4, "in_full": 12},
    ),
    "a prompt, then every 3rd query": (
        {"score_query_stride": 3},
        "h2o",
        {},
        {"every": 3, "prompt": 384},
    ),
}


def select_cab(parameters):
    def select(block_scores, keep, sinks, graph):
        positions = np.array(sorted(block_scores))
        scores = np.array([block_scores[b] for b in positions])
        kept = cab(scores, positions, keep, num_sink_blocks=sinks, graph=graph, **parameters)
        return positions[kept].tolist()

    return select


def select_h2o(block_scores, keep, sinks, graph):
    return oracle.h2o_by_definition(block_scores, keep, sinks)


@pytest.mark.parametrize("case", CASES)
def test_engine_equals_oracle(case, tiny_engines, tiny_llama, monkeypatch):
    from vllm import SamplingParams

    server, policy, parameters, options = CASES[case]
    if "in_full" in options:
        monkeypatch.setattr("vllm_plugins.attention.cpu.SCORED_IN_FULL", options["in_full"])
    prompt = options.get("prompt", len(TOKENS))
    llm = tiny_engines(**server)
    params = SamplingParams(
        max_tokens=max(1, len(TOKENS) - prompt),
        temperature=0.0,
        prompt_logprobs=0,
        logprobs=0,
        ignore_eos=True,
        detokenize=False,
        extra_args={
            "kv_policy": policy,
            "kv_budget_tokens": KEEP * 32,
            "kv_policy_args": parameters,
        },
    )
    # A second request of other tokens: blocks of the two interleave in the pool.
    prompts = [{"prompt_token_ids": TOKENS[:prompt]}, {"prompt_token_ids": TOKENS[:prompt][::-1]}]
    out, _ = llm.generate(prompts, params, use_tqdm=False)
    answer = list(out.outputs[0].token_ids) if prompt < len(TOKENS) else []
    tokens = [*TOKENS[:prompt], *answer]
    expected = oracle.run(
        tiny_llama[1],
        tokens,
        keep=KEEP,
        chunk=64,
        block_size=32,
        select=select_h2o if policy == "h2o" else select_cab(parameters),
        **{"layer_groups": 1, **options},
    )
    record = out.kv_transfer_params["kv_eviction"]
    assert record["trace"] == expected.decisions
    assert record["decisions"] == len(expected.decisions) > 5 * options.get("layer_groups", 1)
    ours = [out.prompt_logprobs[i][tokens[i]].logprob for i in range(1, prompt)]
    answered = zip(out.outputs[0].logprobs, answer, strict=False)
    ours += [entry[token].logprob for entry, token in answered]
    np.testing.assert_allclose(ours, expected.log_likelihoods, atol=2e-4)


def test_layer_groups_choose_for_themselves(tiny_engines):
    from vllm import SamplingParams

    llm = tiny_engines(layer_groups=4, score="decay", score_half_life=16)
    params = SamplingParams(
        max_tokens=1, detokenize=False, extra_args={"kv_policy": "h2o", "kv_sparsity": 0.7}
    )
    prompts = [{"prompt_token_ids": TOKENS}, {"prompt_token_ids": TOKENS[::-1]}]
    record = llm.generate(prompts, params, use_tqdm=False)[0].kv_transfer_params["kv_eviction"]
    by_group = {g: [e["kept"] for e in record["trace"] if e["group"] == g] for g in range(4)}
    assert all(len(kept) == len(by_group[0]) for kept in by_group.values()), "same budget"
    assert len({str(kept) for kept in by_group.values()}) > 1, "different victims"
