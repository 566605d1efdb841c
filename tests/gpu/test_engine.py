"""Engines on a GPU, default settings: full CUDA graphs, async scheduling, chunked prefill.

Models are random Llamas with SmolLM2's head shape, made here; SmolLM2 itself where it was prepared.
"""

import os

import numpy as np
import pytest
import torch

from harness.study.settings import ALL_SCORES

from .mass import mass_by_step
from .models import make_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

POLICIES = ("h2o", "cab", "streaming", "random", "key_norm")
FORMAN = {"cab": {"bridge_definition": "forman"}}
ENGINE = {
    "max_model_len": 4096,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 1024,
    "gpu_memory_utilization": 0.2,
    "kv_cache_memory_bytes": 1 << 30,
    "skip_tokenizer_init": True,
    "seed": 0,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def engines(model):
    """The last engine made is kept; another one ends it."""
    import gc

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
                options = eviction_engine_args(
                    **{
                        "block_size": 16,
                        "policy": "dense",
                        "check_integrity": True,
                        **ALL_SCORES,
                        **settings,
                    }
                )
            running[key] = LLM(model, **{**ENGINE, **engine, **options})
        return running[key]

    yield make
    end()


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 512, size=n).tolist() for n in (900, 40, 2000, 333, 1500, 700)]


def generate(llm, prompts, extra, max_tokens=64, **options):
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


def connector_of(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler.connector


def idle(llm):
    connector = connector_of(llm)
    connector.check_integrity()
    assert connector._pool.get_num_free_blocks() == connector._pool.num_gpu_blocks - 1
    assert connector.ledger.requests == {}


@pytest.fixture(scope="module")
def stock(engines, prompts):
    return tokens(generate(engines(None), prompts, None))


def test_sparsity_0_gives_stocks_tokens(stock, engines, prompts):
    llm = engines({})
    for policy in POLICIES:
        extra = {"kv_policy": policy, "kv_sparsity": 0}
        assert tokens(generate(llm, prompts, extra)) == stock, policy
    scored = generate(llm, prompts, {"kv_policy": "cab", "kv_budget_tokens": 10**7})
    assert tokens(scored) == stock, "scoring alone changes nothing"
    idle(llm)


def test_scores_are_the_attention_mass(engines, prompts):
    """Every query of every layer spreads a mass of 1 per head over the blocks it sees."""
    llm = engines({})
    masses = list(mass_by_step(llm.llm_engine, prompts[0]))
    assert masses
    assert masses == pytest.approx([6 * 9] * len(masses), rel=2e-3)
    idle(llm)


@pytest.mark.parametrize("policy", POLICIES)
def test_budgets_hold_and_runs_repeat(policy, engines, prompts):
    llm = engines({})
    extra = {"kv_policy": policy, "kv_sparsity": 0.9}
    first = generate(llm, prompts, extra)
    for prompt, record in zip(prompts, records(first), strict=True):
        keep = max(4, -(-len(prompt) // 160))
        # Chunks of up to 1,024 tokens; reports lag by the step in flight.
        assert record["peak_blocks"] <= keep + 2 * 1024 // 16 + 2
        if len(prompt) > 200:
            assert record["blocks_evicted"] >= (len(prompt) + 40) // 16 - keep - 1
        assert "policy_error" not in record
    idle(llm)
    again = generate(llm, prompts, extra)
    assert tokens(again) == tokens(first)
    assert [r["blocks_evicted"] for r in records(again)] == [
        r["blocks_evicted"] for r in records(first)
    ]


def test_a_bad_request_does_not_end_the_engine(engines, prompts):
    from vllm.exceptions import VLLMValidationError

    llm = engines({})
    with pytest.raises(VLLMValidationError, match="unknown policy"):
        generate(llm, prompts[:1], {"kv_policy": "h20"})
    extra = {"kv_policy": "cab", "kv_sparsity": 0.5, "kv_policy_args": FORMAN["cab"]}
    with pytest.raises(VLLMValidationError, match="gathered on CPUs only"):
        generate(llm, prompts[:1], extra)
    assert len(tokens(generate(llm, prompts[:1], {}))[0]) == 64
    idle(llm)


@pytest.mark.parametrize("layer_groups", [3, 6])
def test_layer_groups(layer_groups, stock, engines, prompts):
    llm = engines({"layer_groups": layer_groups})
    assert tokens(generate(llm, prompts, {"kv_policy": "h2o", "kv_sparsity": 0})) == stock
    made = records(generate(llm, prompts, {"kv_policy": "h2o", "kv_sparsity": 0.9}))
    assert all(r["blocks_evicted"] > 0 for r in made if r["num_steps"] > 80)
    idle(llm)


def test_mixed_load_preemption_and_aborts(engines):
    """Random arrivals in a pool too small for them; blocks conserved at every step."""
    from vllm import SamplingParams

    llm = engines({}, kv_cache_memory_bytes=32 << 20, max_model_len=2048)
    engine, connector = llm.llm_engine, connector_of(llm)
    rng = np.random.default_rng(7)
    names, arrived, finished = {}, 0, []
    for _ in range(200_000):
        if arrived < 80 and len(names) < 20 and rng.random() < 0.9:
            policy = ("dense", *POLICIES)[arrived % 6]
            extra = {"kv_policy": policy}
            if policy != "dense":
                extra["kv_sparsity"] = float(rng.choice([0.0, 0.5, 0.9]))
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
    assert sum(r["blocks_evicted"] for r in finished) > 100
    assert not any("policy_error" in r for r in finished)
    idle(llm)


def test_what_is_not_supported_is_refused(model):
    from vllm import EngineArgs

    from vllm_plugins import EvictionConfigError, eviction_engine_args
    from vllm_plugins.refusals.engine import check_engine

    def check(engine=None, **settings):
        arguments = {"model": model, **ENGINE, **eviction_engine_args(**settings), **(engine or {})}
        check_engine(EngineArgs(**arguments).create_engine_config())

    check(policy="h2o", sparsity=0.5)
    for engine, settings, sentence in (
        ({"kv_cache_dtype": "fp8"}, {}, 'use kv_cache_dtype="auto"'),
        ({"block_size": 48}, {}, "16, 32, 64 or 128"),
        ({"attention_backend": "FLASH_ATTN"}, {}, "pass attention_backend"),
        (
            {},
            {
                "policy": "cab",
                "sparsity": 0.5,
                "policy_args": {"cab": {"bridge_definition": "forman"}},
            },
            "bridge_definition median",
        ),
    ):
        with pytest.raises(EvictionConfigError, match=sentence):
            check(engine, **settings)


assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0", "tests look inside the engine"
