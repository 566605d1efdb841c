"""Layers with full attention evict beside windowed ones, under CUDA graphs and async scheduling."""

import math

import numpy as np
import pytest
import torch

from tests.engine import token_oracle
from tests.engine.windowed import make
from vllm_plugins.attention.state import worker_state

from .engines import NEEDS_GPU, check_idle, generate, records, tokens

pytestmark = NEEDS_GPU
CHUNK, KEEP, LENGTH = 64, 14, 700
KINDS = ("gemma2", "gemma3", "gpt_oss")
ENGINE = {
    "max_model_len": 1024,
    "max_num_batched_tokens": 256,
    "dtype": "bfloat16",
    "long_prefill_token_threshold": CHUNK,
    "async_scheduling": False,
}


@pytest.fixture(scope="module", params=KINDS)
def hybrid(request, tmp_path_factory):
    """Folder of a model in bfloat16, whose heads are as wide as FlashAttention likes them."""
    if request.param == "gpt_oss" and not _routes_experts():
        pytest.skip("this build of vLLM has no kernels for experts (_moe_C)")
    folder = tmp_path_factory.mktemp(request.param)
    make(request.param, hidden_size=256, head_dim=64).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def _routes_experts():
    import vllm._custom_ops  # noqa: F401  # loads what the build has

    return hasattr(torch.ops._moe_C, "topk_softmax")


@pytest.fixture(scope="module")
def prompt():
    return np.random.default_rng(3).integers(0, 256, size=LENGTH).tolist()


def test_sparsity_0_equals_stock(hybrid, prompt, engines):
    made = []
    for settings, extra in ((None, None), ({}, {"kv_policy": "h2o", "kv_sparsity": 0.0})):
        llm = engines(settings, model=hybrid, **{**ENGINE, "async_scheduling": True})
        made.append(tokens(generate(llm, [prompt, prompt[:333]], extra, 64)))
    assert made[0] == made[1]


def test_kept_tokens_are_the_oracles(hybrid, prompt, engines):
    """bfloat16 here, float32 there: near ties fall otherwise, so nearly all of a set agrees."""
    from transformers import AutoModelForCausalLM

    llm = engines({"granularity": "token"}, model=hybrid, **ENGINE)
    extra = {"kv_policy": "h2o", "kv_budget_tokens": KEEP * 16}
    out, _ = generate(llm, [prompt, prompt[::-1]], extra, 1, prompt_logprobs=0)
    expected = token_oracle.run(
        AutoModelForCausalLM.from_pretrained(hybrid, dtype=torch.float32).eval(),
        prompt,
        keep=KEEP,
        chunk=CHUNK,
        block_size=16,
        recent=0.2,
        slack=2,
        choose=token_oracle.ranked((lambda t, now: t.mass / (now - t.position), 1.0)),
    )
    record = records([out])[0]
    assert record["decisions"] == expected.num_decisions > 0
    position, region = worker_state().tokens.position, record["trace"][-1]["region"]
    shares = [
        len(set(position[layer, region, head].flatten().tolist()) & set(kept)) / len(kept)
        for layer, heads in enumerate(expected.kept)
        for head, kept in enumerate(heads)
    ]
    assert np.mean(shares) > 0.9
    check_idle(llm)


@pytest.mark.parametrize("splits", [1, 4])
def test_the_log_sum_exp_includes_a_sink(splits):
    """The scoring kernels take it from FlashAttention: with it, a sink is in their softmax too."""
    from vllm.v1.attention.backends.fa_utils import (
        flash_attn_supports_sinks,
        flash_attn_varlen_func,
        get_flash_attn_version,
    )

    if not flash_attn_supports_sinks():
        pytest.skip("this GPU's FlashAttention knows no sinks")
    torch.manual_seed(0)
    heads, size, length = 4, 64, 256
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    query, sinks = torch.randn(1, heads, size, **options), torch.randn(heads, **options) + 4
    keys, values = torch.randn(2, length // 16, 16, heads, size, **options)
    _, lse = flash_attn_varlen_func(
        q=query,
        k=keys,
        v=values,
        cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32, device="cuda"),
        max_seqlen_q=1,
        seqused_k=torch.tensor([length], dtype=torch.int32, device="cuda"),
        max_seqlen_k=length,
        softmax_scale=1 / math.sqrt(size),
        causal=True,
        block_table=torch.arange(length // 16, dtype=torch.int32, device="cuda")[None],
        fa_version=get_flash_attn_version(),
        num_splits=splits,
        s_aux=sinks,
        return_softmax_lse=True,
    )
    logits = torch.einsum("hd,nthd->hnt", query[0].double(), keys.double()) / math.sqrt(size)
    logits = torch.cat((logits.flatten(1), sinks.double()[:, None]), 1)
    torch.testing.assert_close(lse[:, 0].double(), logits.logsumexp(1), rtol=1e-2, atol=1e-2)
