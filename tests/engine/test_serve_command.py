"""``kv-eviction serve`` with a user's flags: no memory named, scores that see eviction.

The model is small: it is compiled, as no flag says otherwise, and that takes time for each layer.
"""

import json
import math
import re
import sys
import urllib.request

import pytest

from harness.records.stored import read_record
from harness.resources.server import free_port, serving

from .conftest import windows_of


@pytest.fixture(scope="module")
def server(small_llama, tmp_path_factory):
    command = [
        sys.executable,
        "-m",
        "harness",
        "serve",
        small_llama,
        "--policy",
        "h2o",
        "--sparsity",
        "0.6",
        "--dtype",
        "float32",
        "--score-query-stride",
        "1",
        "--score-layer-stride",
        "1",
        "--score-chunk",
        "64",
        "--served-model-name",
        "small",
    ]
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0", "VLLM_LOGGING_LEVEL": "INFO"}
    with serving(command, free_port(), log, environment=environment) as it:
        yield it


def post(server, path, body):
    request = urllib.request.Request(
        f"{server.base_url}/v1/{path}",
        json.dumps({"model": "small", **body}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def read(server, path):
    with urllib.request.urlopen(server.base_url + path, timeout=30) as response:
        return response.read().decode()


def test_it_starts_without_a_memory_flag_and_says_what_it_chose(server):
    log = server.log.read_text()
    assert "kv-eviction: the KV pool takes" in log
    assert "policy h2o, sparsity 0.6, tokens for every head; prefixes are shared up to" in log
    assert "a request of 1,024 tokens keeps at most 416 tokens, 13 blocks of 32" in log


def test_the_engine_says_what_fits(server):
    """In its log, as only there the pool is known; the figures are the engine's own."""
    log, metrics = server.log.read_text(), read(server, "/metrics")
    blocks = int(re.search(r'num_gpu_blocks="(\d+)"', metrics)[1]) - 1
    assert f"KV eviction: the pool holds {blocks * 32:,} tokens, {blocks:,} blocks" in log
    assert "a step computes at most 64 tokens (max_num_batched_tokens, the chunk) of 1" in log
    assert "async scheduling is off, so one step is in flight; no CUDA graphs" in log
    fit = (blocks - 2) // (13 + 1 + 2)
    assert f"fit at once: {fit:,} by the budget, whichever policy evicts; {blocks // 32:,}" in log


def test_scoring_by_echo_measures_eviction_as_offline_does(
    server, experiment, small_text, small_llama
):
    """As lm-eval asks: token ids, echoed with their log-probs, one token made."""
    record = read_record(experiment[0] / "h2o_s0.6_ctx320_seed0.json")
    windows = record["windows"][:2]
    prompts = windows_of(small_llama, small_text, [window["start"] for window in windows], 320)
    for window, prompt in zip(windows, prompts, strict=True):
        answer = post(
            server, "completions", {"prompt": prompt, "max_tokens": 1, "logprobs": 1, "echo": True}
        )
        values = answer["choices"][0]["logprobs"]["token_logprobs"][1:320]
        assert math.fsum(values) == pytest.approx(sum(window["log_likelihoods"]), rel=1e-4)
        record = answer["kv_transfer_params"]["kv_eviction"]
        assert record["num_steps"] == 5
        assert record["blocks_evicted"] == window["eviction"]["blocks_evicted"] > 0


def test_each_sample_has_its_record(server):
    body = {"prompt": [1] * 400, "max_tokens": 3, "n": 3, "temperature": 1.0, "ignore_eos": True}
    answer = post(server, "completions", body)
    records = answer["kv_transfer_params"]["kv_eviction"]
    assert len(answer["choices"]) == len(records) == 3
    assert all(record["blocks_evicted"] > 0 for record in records)
    assert all(record["effective_sparsity"] > 0.5 for record in records)


def test_chat_and_responses_carry_the_record(server):
    text = "Tell me about the sea. " * 80
    chat = post(
        server,
        "chat/completions",
        {"messages": [{"role": "user", "content": text}], "max_tokens": 4},
    )
    responses = post(server, "responses", {"input": text, "max_output_tokens": 4})
    for answer in (chat, responses):
        assert answer["kv_transfer_params"]["kv_eviction"]["blocks_evicted"] > 0
