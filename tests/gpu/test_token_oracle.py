"""The tokens that every head keeps on a GPU, against plain PyTorch; nothing else is in the way."""

import numpy as np
import pytest
import torch

from tests.engine import token_oracle
from tests.packs import decisions_of, planned_packs
from vllm_plugins.attention.state import worker_state

from .engines import NEEDS_GPU, check_idle, generate, records
from .models import make_llama

pytestmark = NEEDS_GPU
CHUNK, KEEP, LENGTH = 64, 14, 700
TWO_DECISIONS = 420
"""Tokens for what ranks keys. The oracle in float16, its weights as they are and with six errors of
half a last place, keeps 0.989 to 0.995 of such sets alike after two decisions, and 0.937 to 0.966
after the six of ``LENGTH``: too little to judge by."""


def mean(token, now):
    return token.mass / (now - token.position)


PEAKS = {"kv_policy": "cab", "kv_policy_args": {"bridge_definition": "peak"}}
CASES = {
    "h2o": (LENGTH, {"kv_policy": "h2o"}, 0.2, token_oracle.ranked((mean, 1.0))),
    "cab": (
        TWO_DECISIONS,
        {"kv_policy": "cab"},
        0.3,
        token_oracle.then_unlike_the_mean(mean, 0.2),
    ),
    "cab-peak": (
        LENGTH,
        PEAKS,
        0.3,
        token_oracle.ranked((mean, 0.5), (lambda t, now: t.peak, 0.2)),
    ),
    "streaming": (
        LENGTH,
        {"kv_policy": "streaming"},
        1.0,
        token_oracle.ranked((lambda t, now: t.position, 1.0)),
    ),
}


@pytest.fixture(scope="module")
def peaked(tmp_path_factory):
    """A model whose heads look at few tokens, so that near ties are rare."""
    return make_llama(
        tmp_path_factory.mktemp("peaked"),
        num_hidden_layers=3,
        initializer_range=0.15,
        hidden_size=192,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=384,
    )


@pytest.mark.parametrize(
    ("case", "asynchronous"),
    [
        ("h2o", False),
        ("cab", False),
        ("cab-peak", False),
        ("streaming", False),
        ("cab", True),
        ("streaming", True),
    ],
    ids=lambda value: {False: "sync", True: "async"}.get(value, value),
)
def test_engine_equals_oracle(case, asynchronous, engines, peaked):
    """float16 here, float32 there: near ties fall otherwise, so nearly all of a set agrees. How
    far they move log-probs depends on what is ranked: of keys, a token that goes may be one that
    much attention went to. So the oracle itself, in float16, says what rounding may do to
    log-probs; the engine may be half as far again from it.

    Asynchronous scheduling, CUDA's default, decides while the chunk before is still computed: its
    blocks are no candidates yet, but its queries are scored before the workers pack. The oracle
    is told when that was, which is a chunk before at most.
    """
    from transformers import LlamaForCausalLM

    length, method, recent, choose = CASES[case]
    length += CHUNK * asynchronous  # each decision comes a chunk later
    prompt = np.random.default_rng(3).integers(0, 512, size=length).tolist()
    llm = engines(
        {"granularity": "token"},
        model=peaked,
        max_num_batched_tokens=256,
        dtype="float16",
        long_prefill_token_threshold=CHUNK,
        async_scheduling=asynchronous,
    )
    extra = {**method, "kv_budget_tokens": KEEP * 16}
    with planned_packs() as packs:
        out, _ = generate(llm, [prompt, prompt[::-1]], extra, 1, prompt_logprobs=0)
    record = records([out])[0]
    decisions = decisions_of(record, packs)
    lags = {scored - processed for scored, processed in decisions.items()}
    assert lags <= ({0, CHUNK} if asynchronous else {0}), decisions
    expected, rounded = (
        token_oracle.run(
            LlamaForCausalLM.from_pretrained(peaked, dtype=dtype),
            prompt,
            keep=KEEP,
            chunk=CHUNK,
            block_size=16,
            recent=recent,
            slack=2,
            choose=choose,
            decisions=decisions if asynchronous else None,
        )
        for dtype in (torch.float32, torch.float16)
    )
    assert record["decisions"] == expected.num_decisions >= 2
    scores, region = worker_state().tokens, record["trace"][-1]["region"]
    shares, by_rounding = [], []
    for layer, heads in enumerate(expected.kept):
        for head, kept in enumerate(heads):
            ours = scores.position[layer, region, head].flatten().tolist()
            assert len(set(ours)) == len(ours) == len(kept)
            shares.append(len(set(ours) & set(kept)) / len(kept))
            by_rounding.append(len(set(rounded.kept[layer][head]) & set(kept)) / len(kept))
            for array in (scores.mass, scores.peak):
                assert array[layer, region, head].isfinite().all()
    ours = [out.prompt_logprobs[i][prompt[i]].logprob for i in range(1, length)]
    exact = np.array(expected.log_likelihoods[: length - 1])
    difference = np.array(ours) - exact
    rounding = np.abs(np.array(rounded.log_likelihoods[: length - 1]) - exact).mean()
    print(
        case,
        "kept alike",
        min(shares),
        np.mean(shares),
        "by rounding",
        np.mean(by_rounding),
        "log-probs",
        np.abs(difference).mean(),
        difference.mean(),
        "rounding",
        rounding,
    )
    assert rounding < 0.1, "a model that rounding throws about shows nothing"
    assert np.mean(shares) > 0.95
    most = max(0.05, 1.5 * rounding)
    assert np.abs(difference).mean() < most
    assert abs(difference.mean()) < 0.2 * most
    check_idle(llm)
