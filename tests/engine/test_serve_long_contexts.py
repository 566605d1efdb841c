"""``kv-eviction serve`` of contexts that vLLM's own chunk leaves no room for."""

import json
import re
import sys
import urllib.error
import urllib.request

import pytest

from harness.resources.server import free_port, serving

from .conftest import TINY_BLOCK_BYTES

POOL = 64
"""Blocks of 32 tokens, with room for scores among them. A context of 8,192 tokens holds 27 of them,
and with vLLM's chunk of 2,048 tokens 92."""


@pytest.fixture(scope="module")
def server(long_llama, smollm2, engine_slot, tmp_path_factory):
    engine_slot.leave()
    command = [
        *(sys.executable, "-m", "harness", "serve", long_llama),
        *("--policy", "h2o", "--sparsity", "0.9", "--request-budgets", "server"),
        *("--kv-cache-memory-bytes", str(POOL * TINY_BLOCK_BYTES), "--dtype", "float32"),
        *("--served-model-name", "long", "--tokenizer", smollm2, "--enforce-eager"),
    ]
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0", "VLLM_LOGGING_LEVEL": "INFO"}
    with serving(command, free_port(), log, environment=environment) as it:
        yield it


def ask(server, length, **settings):
    body = {"model": "long", "prompt": [7] * length, "max_tokens": 4, "ignore_eos": True}
    request = urllib.request.Request(
        f"{server.base_url}/v1/completions",
        json.dumps({**body, "vllm_xargs": settings}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_a_context_of_four_pools_is_answered_as_was_told(server):
    """No longer context holds more than the log says."""
    log = server.log.read_text()
    assert "the chunk is 512 tokens (--max-num-batched-tokens), chosen by the budget" in log
    peak = int(re.search(r"it holds up to (\d+) blocks", log)[1])
    assert peak < POOL
    status, answer = ask(server, 8192 - 4)
    assert status == 200
    record = answer["kv_transfer_params"]["kv_eviction"]
    assert 26 < record["peak_blocks"] <= peak
    assert record["preemptions"] == 0


def test_the_pool_and_what_fits_are_told(server):
    log = server.log.read_text()
    (blocks,) = {int(n) for n in re.findall(r"the pool holds [\d,]+ tokens, (\d+) blocks", log)}
    assert f"the pool holds about {blocks * 32:,}" in log, "serve's estimate before the start"
    assert "1 by the budget, whichever policy evicts; 0 under dense" in log
    assert (
        "contexts of up to 8,192 tokens are admitted; by the budget this pool holds one of" in log
    )


def test_a_looser_budget_is_http_400(server):
    status, answer = ask(server, 100, kv_sparsity=0.5)
    assert status == 400
    assert "kv_sparsity of at least 0.9" in answer["error"]["message"]
