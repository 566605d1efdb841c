"""A server of two API servers and two engines: every one of them knows eviction."""

import contextlib
import http.client
import json
import re
import urllib.parse
import urllib.request

import psutil
import pytest

from harness.resources.serve_flags import eviction_flags
from harness.resources.server import free_port, serving, vllm_command

FLAGS = (
    *("--served-model-name", "small", "--dtype", "float32", "--max-model-len", "1024"),
    *("--max-num-seqs", "4", "--max-num-batched-tokens", "256"),
    *("--kv-cache-memory-bytes", str(64 << 20), "--enforce-eager"),
    *("--api-server-count", "2", "--data-parallel-size", "2"),
)


@pytest.fixture(scope="module")
def server(small_llama, engine_slot, tmp_path_factory):
    engine_slot.leave()
    settings = {"policy": "streaming", "sparsity": 0.7}
    command = vllm_command(small_llama, [*eviction_flags(32, settings), *FLAGS])
    log = tmp_path_factory.mktemp("scaled") / "log"
    environment = {"VLLM_LOGGING_LEVEL": "INFO", "OMP_NUM_THREADS": "1"}
    with serving(command, free_port(), log, environment=environment) as running:
        yield running


def post(connection, body):
    """Status and answer."""
    request = json.dumps({"model": "small", "prompt": [5] * 600, "max_tokens": 4, **body})
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", request, headers)
    response = connection.getresponse()
    return response.status, json.load(response)


@contextlib.contextmanager
def connected(server):
    """A connection of its own, which any API server may take."""
    address = urllib.parse.urlsplit(server.base_url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=120)
    connection.connect()
    yield connection
    connection.close()


def taken_by(server, connection):
    """The process that answers on a connection."""
    port = connection.sock.getsockname()[1]
    for process in psutil.Process(server.pid).children(recursive=True):
        if any(c.raddr and c.raddr.port == port for c in process.net_connections("tcp")):
            return process.pid
    raise AssertionError("nobody has accepted the connection")


def test_every_api_server_refuses_bad_settings(server):
    """The validator and the middleware are part of each."""
    asked = set()
    for _ in range(60):
        with connected(server) as connection:
            status, body = post(connection, {"vllm_xargs": {"kv_sparsity": 1.5}})
            assert status == 400
            assert "kv_sparsity is 1.5; give a number from 0" in body["error"]["message"]
            status, body = post(connection, {"kv_sparsity": 0.5})
            assert status == 400
            assert "put kv_sparsity into vllm_xargs" in body["error"]["message"]
            asked.add(taken_by(server, connection))
        if len(asked) == 2:
            break
    assert len(asked) == 2, "one of them was never asked"


def test_every_engine_evicts(server):
    """Requests are spread over the data-parallel engines; both free blocks and count them."""
    for _ in range(6):
        with connected(server) as connection:
            extra = {"kv_policy": "h2o", "kv_sparsity": 0.8}
            status, body = post(connection, {"vllm_xargs": extra})
        assert status == 200
        assert body["kv_transfer_params"]["kv_eviction"]["blocks_evicted"] > 3
    with urllib.request.urlopen(f"{server.base_url}/metrics", timeout=60) as response:
        metrics = response.read().decode()
    evicted = re.findall(
        r'(?m)^vllm:kv_eviction_blocks_evicted_total\{engine="(\d)".*\} (\S+)$', metrics
    )
    assert {engine for engine, blocks in evicted if float(blocks) > 0} == {"0", "1"}
