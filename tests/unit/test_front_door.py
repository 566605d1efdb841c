"""Requests are refused in the front end, whichever it is, by what this very server offers."""

import json
import os
import subprocess
import sys

import pytest
from prometheus_client import CollectorRegistry

from vllm_plugins import eviction_engine_args
from vllm_plugins.parsing import EvictionConfigError
from vllm_plugins.refusals.count import refused_requests
from vllm_plugins.refusals.http import RequestCheck, misplaced


def num_refused():
    """As vLLM's ``/metrics`` has it."""
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    refused_requests()
    return get_prometheus_registry().get_sample_value("vllm:kv_eviction_refused_requests_total")


def test_refusals_are_counted_on_after_an_engines_start():
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics

    before = num_refused()
    unregister_vllm_metrics()
    refused_requests().inc()
    assert num_refused() == before + 1


def validate(extra_args, **settings):
    """As ``LLM``, the API server and ``run-batch`` do it: by the class that a name stands for."""
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import validate_logits_processors_parameters

    arguments = eviction_engine_args(**settings)
    params = SamplingParams(extra_args=extra_args)
    validate_logits_processors_parameters(arguments["logits_processors"], params)


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ({"kv_sparsity": 1.5}, "give a number from 0"),
        # Only this server knows these: its block size, what it offers, its policy.
        ({"kv_budget_tokens": 100}, "give at least 128"),
        ({"kv_policy": "streaming", "kv_sparsity": 0.5}, "is not offered by this server"),
        ({"kv_policy_args": {"local": 0.1}}, "sum to 1"),
    ],
)
def test_what_this_server_cannot_follow_is_refused_in_every_front_end(extra, sentence):
    from vllm.exceptions import VLLMValidationError

    server = {"block_size": 64, "policy": "cab", "sparsity": 0.5, "request_policies": ["h2o"]}
    before = num_refused()
    with pytest.raises(VLLMValidationError, match=sentence):
        validate(extra, **server)
    validate({"kv_policy": "h2o", "kv_budget_tokens": 128}, **server)
    assert num_refused() == before + 1


def test_a_block_size_may_be_text_and_is_refused_in_a_sentence():
    arguments = eviction_engine_args(policy="h2o", sparsity=0.5, block_size="64")
    assert arguments["block_size"] == 64
    with pytest.raises(EvictionConfigError, match="block_size is 'big'; give a whole number"):
        eviction_engine_args(policy="h2o", sparsity=0.5, block_size="big")


def test_the_v2_runner_finds_the_validator_by_the_same_name():
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.worker.gpu.sample.logits_processor.loader import (
        build_custom_logits_processors_params_validator,
    )

    (name,) = eviction_engine_args(policy="cab", sparsity=0.5, request_policies=[])[
        "logits_processors"
    ]
    name = name.replace("RequestValidator.", "RequestValidatorV2.")
    check = build_custom_logits_processors_params_validator([name])
    check(SamplingParams(extra_args={"kv_sparsity": 0.9}))
    with pytest.raises(VLLMValidationError, match="is not offered by this server"):
        check(SamplingParams(extra_args={"kv_policy": "h2o"}))


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ('{"kv_policy": "h2o"}', "put kv_policy into vllm_xargs"),
        ('{"k\\u0076_policy": "h2o"}', "put kv_policy into vllm_xargs"),
        ('{"sparsity": 0.5}', "put kv_sparsity into vllm_xargs"),
        ('{"kv_polcy": "h2o"}', "put kv_policy into vllm_xargs"),
        ('{"vllm_args": {"kv_sparsity": 0.5}}', "did you mean 'vllm_xargs'"),
        ('{"extra_body": {"vllm_xargs": {}}}', "extra_body belongs to the OpenAI client"),
    ],
)
def test_a_setting_that_nobody_reads_is_http_400(body, sentence):
    before = num_refused()
    status, answer = ask(body.encode())
    assert status == 400
    assert num_refused() == before + 1
    assert sentence in json.loads(answer)["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "kv_policy", "vllm_xargs": {"kv_policy": "h2o"}}',
        b'{"vllm_xargs": ' + b"[" * 100_000,
        b"[1]",
        b"kv_ no json",
        b"",
    ],
)
def test_all_else_reaches_the_server_as_it_is(body):
    before = num_refused()
    assert ask(body) == (200, body)
    assert num_refused() == before


def test_refusals_of_several_api_servers_add_up(tmp_path):
    """Each is a process of its own; vLLM's ``/metrics`` reads the files that they write."""
    from prometheus_client.multiprocess import MultiProcessCollector

    for number in (1, 2):
        code = "from vllm_plugins.refusals.count import refused_requests; "
        subprocess.run(
            [sys.executable, "-c", f"{code}refused_requests().inc({number})"],
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
            check=True,
        )
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path))
    assert registry.get_sample_value("vllm:kv_eviction_refused_requests_total") == 3


def test_no_field_of_the_apis_is_taken_for_a_misplaced_one():
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    for request in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        for name in request.model_fields:
            assert misplaced(json.dumps({name: {}}).encode()) is None, name


def ask(body):
    """Status and body, through the middleware, of a server that answers with what it read."""
    import asyncio

    sent = []
    parts = [body[: len(body) // 2], body[len(body) // 2 :]]
    messages = [
        {"type": "http.request", "body": part, "more_body": i == 0} for i, part in enumerate(parts)
    ]

    async def receive():
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    async def app(scope, receive, send):
        read = b""
        while (message := await receive())["type"] == "http.request":
            read += message["body"]
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": read})

    scope = {"type": "http", "method": "POST"}
    asyncio.run(RequestCheck(app)(scope, receive, send))
    return sent[0]["status"], sent[1]["body"]
