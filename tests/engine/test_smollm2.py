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

# Whole blocks of 32 and parts of one; one chunk of 64, and many.
LENGTHS = (330, 150, 545, 64, 97, 210)
MAX_TOKENS = 34  # each request fills a block and starts another


@pytest.fixture(scope="module")
def prompts(smollm2_engine, canterbury):
    tokens = smollm2_engine.get_tokenizer()(canterbury[:60_000]).input_ids
    starts = range(0, 6000, 1000)
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
    """``extra_args``: of all requests, or a list of each one's."""
    from vllm import SamplingParams

    each = extra_args if isinstance(extra_args, list) else [extra_args] * len(prompts)
    params = [SamplingParams(temperature=0.0, extra_args=extra, **options) for extra in each]
    return llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


def records(outputs):
    return [output.kv_transfer_params["kv_eviction"] for output in outputs]


@pytest.mark.parametrize("first", [0, 3, 6])
def test_sparsity_0_equals_stock(first, smollm2_engine, prompts, stock):
    """A policy a request, all in one batch; each with prompts of several lengths."""
    names = policy_names()
    extra = [
        {"kv_policy": names[(first + i) % len(names)], "kv_sparsity": 0}
        for i in range(len(prompts))
    ]
    assert answers(smollm2_engine, prompts, MAX_TOKENS, extra) == stock


def test_scoring_alone_changes_nothing(smollm2_engine, prompts, stock):
    """A budget nobody reaches: every score is gathered, nothing is evicted."""
    extra = {
        "kv_policy": "cab",
        "kv_budget_tokens": 100_000,
        "kv_policy_args": {"bridge_definition": "forman"},
    }
    assert answers(smollm2_engine, prompts, MAX_TOKENS, [extra] * len(prompts)) == stock


def test_budgets_hold_at_sparsity_09(smollm2_engine, canterbury):
    """A window for each policy, side by side."""
    length = 1024
    tokens = smollm2_engine.get_tokenizer()(canterbury[:60_000]).input_ids
    policies = [name for name in policy_names() if name != "dense"]
    windows = [tokens[i * length :][:length] for i in range(len(policies))]
    connector = connector_of(smollm2_engine)
    before = connector.ledger.totals["blocks_evicted"]
    extra = [{"kv_policy": policy, "kv_sparsity": 0.9} for policy in policies]
    made = records(generate(smollm2_engine, windows, extra, max_tokens=32, ignore_eos=True))
    keep, chunk_blocks = math.ceil(0.1 * length / 32), 64 // 32
    for policy, record in zip(policies, made, strict=True):
        assert record["policy"] == policy
        assert record["peak_blocks"] == keep + chunk_blocks, policy
        # All but the last token were written, to whole blocks and one more; keep + that one stay.
        assert record["blocks_evicted"] == length // 32 - keep, policy
        assert record["first_eviction_tokens"] == (keep + 2) // 2 * 64, policy
        assert all(0 in entry["kept"] for entry in record["trace"]), f"the sink stays: {policy}"
        assert all(len(entry["kept"]) <= keep for entry in record["trace"]), policy
    evicted = sum(record["blocks_evicted"] for record in made)
    assert connector.ledger.totals["blocks_evicted"] - before == evicted
    idle(connector)


def idle(connector):
    """Nothing is left over once no request runs."""
    connector.check_integrity()
    pool = connector._pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert connector.ledger.requests == {}


def test_dense_perplexity_is_that_of_transformers(smollm2_engine, wiki_windows, wiki_losses):
    """In long windows, chunk by chunk, against one pass."""
    _, windows = wiki_windows
    outputs = generate(
        smollm2_engine, windows, {"kv_policy": "dense"}, max_tokens=1, prompt_logprobs=0
    )
    for window, output, loss in zip(windows, outputs, wiki_losses, strict=True):
        log_probs = [output.prompt_logprobs[i][window[i]].logprob for i in range(1, len(window))]
        assert -sum(log_probs) / len(log_probs) == pytest.approx(loss, rel=1e-3)


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
