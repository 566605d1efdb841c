"""On a real model: equality with stock vLLM, budgets held, memory freed, bad requests refused."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_plugins.policies import policy_names

from .conftest import SMOLLM2_ARGUMENTS, connector_of
from .stock_reference import answers

LENGTHS = (700, 300, 1030, 64)
MAX_TOKENS = 64


@pytest.fixture(scope="module")
def prompts(smollm2_engine, canterbury):
    tokens = smollm2_engine.get_tokenizer()(canterbury[:40_000]).input_ids
    starts = [100, 2000, 3000, 6000]
    return [tokens[s : s + n] for s, n in zip(starts, LENGTHS, strict=True)]


@pytest.fixture(scope="module")
def stock(smollm2, prompts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    request = {
        "engine": {**SMOLLM2_ARGUMENTS, "block_size": 32},
        "prompts": prompts,
        "max_tokens": MAX_TOKENS,
    }
    (folder / "request.json").write_text(json.dumps(request))
    script = Path(__file__).with_name("stock_reference.py")
    command = [sys.executable, script, smollm2, folder / "request.json", folder / "answer.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "answer.json").read_text())


def generate(llm, prompts, extra_args, **options):
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, extra_args=extra_args, **options)
    return llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


def records(outputs):
    return [output.kv_transfer_params["kv_eviction"] for output in outputs]


@pytest.mark.parametrize("policy", policy_names())
def test_sparsity_0_equals_stock(policy, smollm2_engine, prompts, stock):
    extra = {"kv_policy": policy, "kv_sparsity": 0}
    assert answers(smollm2_engine, prompts, MAX_TOKENS, extra) == stock


def test_scoring_alone_changes_nothing(smollm2_engine, prompts, stock):
    """A budget nobody reaches: every score is gathered, nothing is evicted."""
    extra = {
        "kv_policy": "cab",
        "kv_budget_tokens": 100_000,
        "kv_policy_args": {"bridge_definition": "forman"},
    }
    assert answers(smollm2_engine, prompts, MAX_TOKENS, extra) == stock


@pytest.mark.parametrize("policy", [name for name in policy_names() if name != "dense"])
def test_budget_holds_at_sparsity_09(policy, smollm2_engine, canterbury):
    tokens = smollm2_engine.get_tokenizer()(canterbury[:40_000]).input_ids
    windows = [tokens[:2048], tokens[2048:4096]]
    connector = connector_of(smollm2_engine)
    before = connector.ledger.totals["blocks_evicted"]
    extra = {"kv_policy": policy, "kv_sparsity": 0.9}
    made = records(generate(smollm2_engine, windows, extra, max_tokens=32, ignore_eos=True))
    keep, chunk_blocks = math.ceil(0.1 * 2048 / 32), 64 // 32
    for record in made:
        assert record["policy"] == policy
        assert record["peak_blocks"] == keep + chunk_blocks
        # 2,048 + 31 tokens were written to 65 blocks; keep + the one being written are left.
        assert record["blocks_evicted"] == 64 - keep
        assert record["first_eviction_tokens"] == (keep + 2) // 2 * 64
        assert all(0 in entry["kept"] for entry in record["trace"]), "the sink stays"
        assert all(len(entry["kept"]) <= keep for entry in record["trace"])
    evicted = sum(record["blocks_evicted"] for record in made)
    assert connector.ledger.totals["blocks_evicted"] - before == evicted
    idle(connector)


def idle(connector):
    """Nothing is left over once no request runs."""
    connector.check_integrity()
    pool = connector._pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert connector.ledger.requests == {}


@pytest.mark.parametrize(("context", "expected"), [(1024, 29.22), (2048, 24.34)])
def test_dense_perplexity_is_that_of_transformers(context, expected, smollm2_engine, wiki_test):
    """Reference: Transformers, float32, the first 8,192 tokens in windows without overlap."""
    tokens = smollm2_engine.get_tokenizer()(wiki_test[:100_000]).input_ids[:8192]
    windows = [tokens[i : i + context] for i in range(0, 8192, context)]
    outputs = generate(
        smollm2_engine, windows, {"kv_policy": "dense"}, max_tokens=1, prompt_logprobs=0
    )
    nll = [
        -output.prompt_logprobs[i][window[i]].logprob
        for window, output in zip(windows, outputs, strict=True)
        for i in range(1, context)
    ]
    assert math.exp(sum(nll) / len(nll)) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ({"kv_policy": "h20"}, "unknown policy 'h20'"),
        ({"kv_sparsity": "abc"}, "kv_sparsity is 'abc'"),
        ({"kv_sparsity": 1.0}, "kv_sparsity is 1.0"),
        ({"kv_sparsity": 0.5, "kv_budget_tokens": 512}, "not both"),
        ({"kv_sparsty": 0.5}, "did you mean 'kv_sparsity'"),
    ],
)
def test_bad_request_is_refused_and_the_engine_lives(extra, sentence, smollm2_engine, prompts):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=sentence):  # HTTP 400 in the server
        generate(smollm2_engine, prompts[-1:], extra, max_tokens=1)
    idle(connector_of(smollm2_engine))
    assert generate(smollm2_engine, prompts[-1:], {}, max_tokens=1)[0].finished


def test_behind_a_front_end_without_the_validator_bad_settings_fall_back_and_are_counted(
    smollm2_engine, prompts, monkeypatch
):
    """A budget below the protected blocks depends on the engine's block size."""
    from vllm.exceptions import VLLMValidationError

    from vllm_plugins.refusals.requests import RequestValidator

    connector = connector_of(smollm2_engine)
    before = connector.ledger.totals["refused_settings"]
    extra = {"kv_policy": "h2o", "kv_budget_tokens": 40}
    with pytest.raises(VLLMValidationError, match="give at least 64"):
        generate(smollm2_engine, prompts[:1], extra, max_tokens=1)
    nothing = classmethod(lambda cls, params: None)
    monkeypatch.setattr(RequestValidator.__mro__[1], "validate_params", nothing)
    (record,) = records(generate(smollm2_engine, prompts[:1], extra, max_tokens=1))
    assert "give at least 64" in record["refused_settings"]
    assert record["policy"] == "dense"
    assert connector.ledger.totals["refused_settings"] == before + 1


def test_absolute_budget(smollm2_engine, prompts):
    extra = {"kv_policy": "streaming", "kv_budget_tokens": 160}
    (record,) = records(generate(smollm2_engine, prompts[2:3], extra, max_tokens=1))
    # Alone in the engine, a request gets the whole token budget, 512, as its chunk.
    assert record["peak_blocks"] <= 5 + 512 // 32
    assert len(record["trace"][-1]["kept"]) == 5


def test_metrics_reach_vllms_own(smollm2_engine, prompts):
    generate(smollm2_engine, prompts[:2], {"kv_policy": "h2o", "kv_sparsity": 0.9}, max_tokens=4)
    connector = connector_of(smollm2_engine)
    totals = connector.ledger.totals
    assert total("blocks_evicted") == totals["blocks_evicted"] > 0
    assert total("decisions") == totals["decisions"]
    assert total("decision_seconds") == pytest.approx(totals["decision_seconds"])
    assert total("scoring_seconds") == pytest.approx(sum(connector.scoring_seconds.values()))
    assert totals["decision_seconds"] > 0
    assert total("requests", policy="h2o") >= 2
    names = {metric.name for metric in smollm2_engine.get_metrics()}
    assert {"vllm:kv_eviction_blocks_evicted", "vllm:kv_eviction_live_share"} <= names


def total(name, **labels):
    """Value of one of our counters in the process's Prometheus registry."""
    from prometheus_client import REGISTRY

    values = [
        sample.value
        for metric in REGISTRY.collect()
        if metric.name == f"vllm:kv_eviction_{name}"
        for sample in metric.samples
        if sample.name.endswith("_total") and labels.items() <= sample.labels.items()
    ]
    return sum(values)
