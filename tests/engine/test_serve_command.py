"""``kv-eviction serve`` with a user's flags: no memory named, scores that see eviction."""

import json
import math
import sys
import urllib.request

import pytest

from harness.resources.server import free_port, serving


@pytest.fixture(scope="module")
def server(smollm2, tmp_path_factory):
    command = [
        sys.executable, "-m", "harness", "serve", "smollm2-135m", "--policy", "h2o",
        "--sparsity", "0.6", "--dtype", "float32",
        "--score-query-stride", "1", "--score-layer-stride", "1",
        "--score-chunk", "64",
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0", "VLLM_LOGGING_LEVEL": "INFO"}
    with serving(command, free_port(), log, environment=environment) as it:
        yield it


def post(server, path, body):
    request = urllib.request.Request(
        f"{server.base_url}/v1/{path}",
        json.dumps({"model": "smollm2-135m", **body}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def test_it_starts_without_a_memory_flag_and_says_what_it_chose(server):
    log = server.log.read_text()
    assert "kv-eviction: the KV pool takes" in log
    assert "KV eviction: policy h2o, sparsity 0.6; prefix caching is off" in log


def test_scoring_by_echo_measures_eviction_as_offline_does(
    server, offline_figure, canterbury, smollm2
):
    """As lm-eval asks: token ids, echoed with their log-probs, one token made."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(smollm2)(canterbury, add_special_tokens=False).input_ids
    for window in offline_figure["windows"][:2]:
        prompt = tokens[window["start"] :][:320]
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
    chat = post(server, "chat/completions", {"messages": [{"role": "user", "content": text}],
                                             "max_tokens": 4})  # fmt: skip
    responses = post(server, "responses", {"input": text, "max_output_tokens": 4})
    for answer in (chat, responses):
        assert answer["kv_transfer_params"]["kv_eviction"]["blocks_evicted"] > 0
