"""Token granularity on a GPU: kernels, and engines with default settings (graphs, async)."""

import gc

import numpy as np
import pytest
import torch

from harness.study.settings import ALL_SCORES
from tests.engine import token_oracle
from tests.kernels.token_cases import check_choice, check_pack, check_start, check_token_mass
from vllm_plugins.attention.state import worker_state

from .models import make_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

POLICIES = ("h2o", "cab", "streaming", "random", "key_norm")
ENGINE = {
    "max_model_len": 4096,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 1024,
    "gpu_memory_utilization": 0.2,
    "kv_cache_memory_bytes": 1 << 30,
    "skip_tokenizer_init": True,
    "seed": 0,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
@pytest.mark.parametrize("block_size", [16, 32])
def test_token_mass(head_size, block_size, dtype):
    shape = {"heads": 8, "kv_heads": 2, "head_size": head_size, "block_size": block_size}
    check_token_mass("cuda", dtype=dtype, unscored=[2], **shape)
    check_token_mass("cuda", dtype=dtype, options={"decay": 0.9, "decode_weight": 4}, **shape)
    rows = [(1, 40), (0, 0), (1, 16), (1, 3001)] + [(1, 500)] * 20
    check_token_mass("cuda", dtype=dtype, rows=rows, one_query=True, **shape)


def test_tokens_start_afresh():
    check_start("cuda")


@pytest.mark.parametrize("policy", ["h2o", "cab", "streaming", "random"])
def test_packing(policy):
    check_pack(policy, {}, "cuda")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("blocks", [(9, 6, 3), (29, 28, 12), (150, 40, 600)])
def test_the_fused_choice_is_that_of_torch(blocks, tied):
    for rankings in ([("score", 1.0)], [("score", 0.5), ("peak", 0.2)], [("position", 1.0)]):
        check_choice(rankings, "cuda", blocks=blocks, tied=tied)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def engines(llama):
    from vllm import LLM

    from vllm_plugins import eviction_engine_args

    running = {}

    def end():
        for llm in running.values():
            llm.llm_engine.engine_core.shutdown()
        running.clear()
        gc.collect()
        torch.cuda.empty_cache()

    def make(settings, **engine):
        key = repr((settings, engine))
        if key not in running:
            end()
            options = {"block_size": 16, "enable_prefix_caching": False}
            if settings is not None:
                common = {
                    "block_size": 16,
                    "policy": "dense",
                    "check_integrity": True,
                    "trace_decisions": True,
                    "granularity": "token",
                }
                options = eviction_engine_args(**{**common, **ALL_SCORES, **settings})
            running[key] = LLM(**{"model": llama, **ENGINE, **engine, **options})
        return running[key]

    yield make
    end()


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 512, size=n).tolist() for n in (900, 40, 2000, 333, 1500, 700)]


def generate(llm, prompts, extra, max_tokens=200, **options):
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0,
        ignore_eos=True,
        detokenize=False,
        extra_args=extra,
        **options,
    )
    return llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


def tokens(outputs):
    return [list(output.outputs[0].token_ids) for output in outputs]


def records(outputs):
    return [output.kv_transfer_params["kv_eviction"] for output in outputs]


def idle(llm):
    connector = llm.llm_engine.engine_core.engine_core.scheduler.connector
    connector.check_integrity()
    assert connector._pool.get_num_free_blocks() == connector._pool.num_gpu_blocks - 1
    assert connector.ledger.requests == {}


def test_sparsity_0_gives_stocks_tokens(engines, prompts):
    stock = tokens(generate(engines(None), prompts, None))
    llm = engines({})
    for policy in POLICIES:
        assert tokens(generate(llm, prompts, {"kv_policy": policy, "kv_sparsity": 0})) == stock
    scored = generate(llm, prompts, {"kv_policy": "cab", "kv_budget_tokens": 10**7})
    assert tokens(scored) == stock, "scoring alone changes nothing"
    idle(llm)


@pytest.mark.parametrize("policy", POLICIES)
def test_budgets_hold_and_runs_repeat(policy, engines, prompts):
    llm = engines({})
    extra = {"kv_policy": policy, "kv_sparsity": 0.9}
    first = generate(llm, prompts, extra)
    for prompt, record in zip(prompts, records(first), strict=True):
        keep = max(4, -(-(len(prompt) + 200) // 160))
        # Chunks of up to 1,024 tokens, and the slack.
        assert record["peak_blocks"] <= keep + 2 * 1024 // 16 + 6
        if len(prompt) > 200:
            assert record["blocks_evicted"] >= (len(prompt) + 160) // 16 - keep - 5
        assert "policy_error" not in record
    idle(llm)
    again = generate(llm, prompts, extra)
    assert tokens(again) == tokens(first)


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


@pytest.mark.parametrize("case", ["h2o", "cab", "streaming"])
def test_engine_equals_oracle(case, engines, peaked):
    """float16 here, float32 there: near ties fall otherwise, so nearly all of a set agrees."""
    from transformers import LlamaForCausalLM

    def mean(t, now):
        return t.mass / (now - t.position)

    recent, choose = {
        "h2o": (0.2, token_oracle.ranked((mean, 1.0))),
        "cab": (0.3, token_oracle.ranked((mean, 0.5), (lambda t, now: t.peak, 0.2))),
        "streaming": (1.0, token_oracle.ranked((lambda t, now: t.position, 1.0))),
    }[case]
    prompt = np.random.default_rng(3).integers(0, 512, size=700).tolist()
    # Asynchronous scheduling evicts a step later: a chunk, while a prompt is computed.
    llm = engines(
        {},
        model=peaked,
        max_num_batched_tokens=256,
        dtype="float16",
        long_prefill_token_threshold=64,
        async_scheduling=False,
    )
    extra = {"kv_policy": case, "kv_budget_tokens": 14 * 16}
    out, _ = generate(llm, [prompt, prompt[::-1]], extra, max_tokens=1, prompt_logprobs=0)
    expected = token_oracle.run(
        LlamaForCausalLM.from_pretrained(peaked, dtype=torch.float32),
        prompt,
        keep=14,
        chunk=64,
        block_size=16,
        recent=recent,
        slack=2,
        choose=choose,
    )
    record = records([out])[0]
    assert record["decisions"] == expected.num_decisions > 0
    position = worker_state().tokens.position
    region = record["trace"][-1]["region"]
    shares = []
    for layer, heads in enumerate(expected.kept):
        for head, kept in enumerate(heads):
            ours = position[layer, region, head].flatten().tolist()
            assert len(set(ours)) == len(ours) == len(kept)
            shares.append(len(set(ours) & set(kept)) / len(kept))
    ours = [out.prompt_logprobs[i][prompt[i]].logprob for i in range(1, 700)]
    difference = np.array(ours) - expected.log_likelihoods[:699]
    print(
        case,
        "kept alike",
        min(shares),
        np.mean(shares),
        "log-probs",
        np.abs(difference).mean(),
        difference.mean(),
    )
    assert np.mean(shares) > 0.95
    assert np.abs(difference).mean() < 0.05
    assert abs(difference.mean()) < 0.01


def test_mixed_load_preemption_and_aborts(engines):
    """Random arrivals in a pool too small for them, of both granularities; blocks conserved."""
    from vllm import SamplingParams

    llm = engines({}, kv_cache_memory_bytes=32 << 20, max_model_len=2048)
    engine = llm.llm_engine
    connector = engine.engine_core.engine_core.scheduler.connector
    rng = np.random.default_rng(7)
    names, arrived, finished = {}, 0, []
    for _ in range(200_000):
        if arrived < 80 and len(names) < 20 and rng.random() < 0.9:
            policy = ("dense", *POLICIES)[arrived % 6]
            extra = {"kv_policy": policy}
            if policy != "dense":
                extra["kv_sparsity"] = float(rng.choice([0.0, 0.5, 0.9]))
                extra["kv_granularity"] = str(rng.choice(["token", "token", "block"]))
            prompt = rng.integers(0, 512, size=int(rng.integers(1, 1500))).tolist()
            params = SamplingParams(
                max_tokens=int(rng.integers(1, 300)),
                ignore_eos=True,
                detokenize=False,
                extra_args=extra,
            )
            name = f"r{arrived}"
            names[name] = engine.add_request(name, {"prompt_token_ids": prompt}, params)
            arrived += 1
        if names and rng.random() < 0.02:
            name = str(rng.choice(list(names)))
            engine.abort_request([names.pop(name)], internal=True)
        for output in engine.step():
            if output.finished:
                names.pop(output.request_id, None)
                finished.append(output.kv_transfer_params["kv_eviction"])
        connector.check_integrity()
        if arrived == 80 and not engine.has_unfinished_requests():
            break
    assert len(finished) > 40
    assert sum(r["preemptions"] for r in finished) > 0, "the pool was meant to be too small"
    by_token = [r for r in finished if r["granularity"] == "token"]
    assert sum(r["blocks_evicted"] for r in by_token) > 100
    assert not any("policy_error" in r for r in finished)
    idle(llm)
