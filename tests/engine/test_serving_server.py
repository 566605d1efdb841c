"""One real server for all tests here: the API, its metrics, a load with quality, the dashboard."""

import json
import math
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import yaml

from harness.cli import main
from harness.resources.serve_flags import eviction_flags
from harness.resources.server import free_port, serving, vllm_command
from harness.study.settings import ALL_SCORES

GRAFANA = Path(__file__).resolve().parents[2] / "scripts" / "grafana"
_METRIC = re.compile(r"vllm:\w+|http_\w+")
_HISTOGRAM = re.compile(r"_(bucket|sum|count)$")
# Scores as `kv-eviction offline` gathers them: its perplexity is compared with.
SETTINGS = {
    "policy": "h2o",
    "sparsity": 0.6,
    "request_policies": ["cab", "dense"],
    **ALL_SCORES,
}
FLAGS = [
    "--served-model-name",
    "smollm2",
    "--dtype",
    "float32",
    "--max-model-len",
    "512",
    "--max-num-seqs",
    "8",
    "--max-num-batched-tokens",
    "512",
    "--long-prefill-token-threshold",
    "64",
    "--kv-cache-memory-bytes",
    str(150 << 20),
    "--enforce-eager",
]


@pytest.fixture(scope="module")
def server(smollm2, tmp_path_factory):
    command = vllm_command(smollm2, [*eviction_flags(32, SETTINGS), *FLAGS])
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_LOG_STATS_INTERVAL": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0",
    }
    with serving(command, free_port(), log, environment=environment) as running:
        yield running


@pytest.fixture(scope="module")
def record(server, tmp_path_factory):
    """A load with quality requests, on the running server."""
    output = tmp_path_factory.mktemp("load") / "record.json"
    status = main(
        [
            "load",
            "--base-url",
            server.base_url,
            "--output",
            str(output),
            "--num-requests",
            "20",
            "--request-rate",
            "8",
            "--input-length",
            "200",
            "--output-length",
            "32",
            "--quality-share",
            "0.2",
            "--quality-windows",
            "4",
            "--quality-context-length",
            "320",
            "--server-pid",
            str(server.pid),
            "--sample-interval",
            "0.5",
        ]
    )
    assert status == 0
    return json.loads(output.read_text())


def post(server, body):
    request = urllib.request.Request(
        f"{server.base_url}/v1/completions",
        json.dumps({"model": "smollm2", "prompt": "Hello", "max_tokens": 2, **body}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kv_sparsity": 1.5}, "kv_sparsity is 1.5; give a number from 0"),
        ({"kv_policy": "nope"}, "unknown policy 'nope'"),
        ({"kv_sparsty": 0.5}, "did you mean 'kv_sparsity'"),
        # Only this server knows these two: its block size, and what it offers.
        ({"kv_budget_tokens": 40}, "give at least 64"),
        ({"kv_policy": "streaming", "kv_sparsity": 0.5}, "is not offered by this server"),
    ],
)
def test_bad_settings_are_http_400_with_a_sentence(settings, sentence, server):
    status, body = post(server, {"vllm_xargs": settings})
    assert status == 400
    assert sentence in body["error"]["message"]
    assert "\n" not in body["error"]["message"]


def test_settings_of_a_request_are_followed(server):
    status, body = post(server, {"vllm_xargs": {"kv_policy": "cab", "kv_sparsity": 0.9}})
    assert status == 200
    assert body["kv_transfer_params"]["kv_eviction"]["policy"] == "cab"
    assert post(server, {})[1]["kv_transfer_params"]["kv_eviction"]["sparsity"] == 0.6


def test_bodies_that_are_no_request_stay_vllms_business(server):
    status, body = post(server, {"vllm_xargs": [1]})
    assert status == 400
    assert "vllm_xargs" in body["error"]["message"]


def test_the_openai_client_works_unchanged(server):
    import openai

    client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none")
    stream = client.completions.create(
        model="smollm2",
        prompt="Once upon a time",
        max_tokens=8,
        stream=True,
        extra_body={"vllm_xargs": {"kv_policy": "cab", "kv_sparsity": 0.5}},
    )
    assert sum(1 for _ in stream) >= 8
    chat = client.chat.completions.create(
        model="smollm2", messages=[{"role": "user", "content": "Hi"}], max_tokens=4
    )
    assert chat.usage.completion_tokens == 4
    with pytest.raises(openai.BadRequestError, match="give a number from 0"):
        client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": "Hi"}],
            extra_body={"vllm_xargs": {"kv_sparsity": 2}},
        )


def test_a_record_has_latency_memory_and_quality_on_one_clock(record):
    assert record["counts"]["succeeded"] == 20
    assert record["requests"]["output_tokens"] == [32] * 16
    samples = record["samples"]
    assert samples["time_s"][0] < 1.0
    assert samples["time_s"][-1] == pytest.approx(record["duration_s"], abs=1.5)
    assert max(samples["kv_cache_usage"]) > 0.1
    assert max(samples["num_requests_running"]) >= 4
    assert record["memory"]["kv_eviction_blocks_evicted"] > 40
    assert record["memory"]["kv_eviction_requests:h2o"] == 20
    assert record["memory"]["process_memory_mib"]["max"] > 300
    assert record["memory"]["kv_cache_memory_bytes"] == 150 << 20
    assert sum(record["output_tokens"]["tokens"]) == pytest.approx(16 * 32 + 4, abs=4)


def test_perplexity_under_load_is_the_offline_figure(record, evaluation):
    offline_figure = evaluation["h2o"]
    quality = record["quality"]
    assert quality["num_answered"] == 4
    assert quality["num_other_chunk"] == 0
    assert [w["start"] for w in offline_figure["windows"]] == sorted(
        w["start"] for w in quality["windows"]
    )
    assert quality["perplexity"] == pytest.approx(offline_figure["perplexity"], rel=1e-4)
    assert quality["perplexity_after_eviction"] == pytest.approx(
        offline_figure["perplexity_after_eviction"], rel=1e-4
    )


def test_the_server_logs_its_counters(record, server):
    """vLLM's own line, at its own intervals."""
    line = r"KV Transfer metrics: KV eviction: blocks_evicted=\d+, .*mean_peak_blocks=\d+"
    assert re.search(line, server.log.read_text())


def metrics(server):
    with urllib.request.urlopen(f"{server.base_url}/metrics", timeout=30) as response:
        return response.read().decode()


def live_share(server):
    return float(re.search(r"(?m)^vllm:kv_eviction_live_share\{.*\} (\S+)$", metrics(server))[1])


def test_the_live_share_of_an_idle_server_is_not_a_number(record, server):
    assert 0 < min(record["samples"]["kv_eviction_live_share"]) < 1
    assert math.isnan(live_share(server))


def test_the_live_share_forgets_an_aborted_request(server):
    """The client hangs up; nothing but the abort tells the engine."""
    body = {
        "model": "smollm2",
        "prompt": [1] * 300,
        "max_tokens": 200,
        "stream": True,
        "ignore_eos": True,
    }
    request = urllib.request.Request(
        f"{server.base_url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        response.readline()
        assert until(lambda: 0 < live_share(server) < 1)
    assert until(lambda: math.isnan(live_share(server)))


def until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return held


def test_every_query_of_dashboard_and_rules_finds_its_metric(record, server):
    assert post(server, {"vllm_xargs": {"kv_sparsity": 2}})[0] == 400
    live = set(re.findall(r"(?m)^([\w:]+)[{ ]", metrics(server)))
    dashboard = json.loads((GRAFANA / "kv_eviction.json").read_text())
    queries = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    queries += [
        v["query"]["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"
    ]
    asked = {name for query in queries for name in _METRIC.findall(query)}
    assert len(asked) > 12
    ours = {name for name in live if name.startswith("vllm:kv_eviction_")}
    ours = {_HISTOGRAM.sub("", name) for name in ours if not name.endswith("_created")}
    shown = {_HISTOGRAM.sub("", name) for name in asked}
    assert ours <= shown, "a metric of ours that no panel shows"
    (rules,) = yaml.safe_load((GRAFANA / "alerts.yaml").read_text())["groups"]
    alerted = {name for rule in rules["rules"] for name in _METRIC.findall(rule["expr"])}
    assert len(alerted) == 5
    assert asked | alerted <= live


def test_refused_requests_are_counted(server):
    def num_refused():
        return float(
            re.search(r"(?m)^vllm:kv_eviction_refused_requests_total (\S+)$", metrics(server))[1]
        )

    before = num_refused()
    assert post(server, {"vllm_xargs": {"kv_policy": "nope"}})[0] == 400
    assert post(server, {"kv_sparsity": 0.5})[0] == 400
    assert post(server, {})[0] == 200
    assert num_refused() == before + 2


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_sparsity": 10**400},
        {"kv_sparsity": math.nan},
        {"kv_budget_tokens": 2**40},
        {"kv_budget_tokens": "9" * 5000},
        {"kv_policy_args": "[" * 100_000},
        {"kv_policy_args": '{"recent": ' + "[" * 900 + "]" * 900 + "}"},
        {"kv_policy_args": '{"recent": NaN}'},
        {"kv_policy": "x" * 100_000},
        {"kv_policy": "../../etc/passwd"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_values_out_of_all_bounds_are_http_400(settings, server):
    status, body = post(server, {"vllm_xargs": settings})
    assert status == 400
    assert len(body["error"]["message"]) < 500


def test_a_prompt_stands_in_no_log_and_in_no_metric(server):
    """Neither of a request that is answered, nor of one that is refused."""
    secret = "zanzibar-marmalade"
    assert post(server, {"prompt": f"{secret} " * 60})[0] == 200
    assert post(server, {"prompt": secret, "vllm_xargs": {"kv_sparsity": 3}})[0] == 400
    assert post(server, {"prompt": secret, "kv_sparsity": 0.5})[0] == 400
    assert until(lambda: "KV eviction: blocks_evicted" in server.log.read_text())
    assert secret not in server.log.read_text()
    assert secret not in metrics(server)


def test_an_engine_that_is_killed_ends_a_load(server, tmp_path):
    """Last: the server does not outlive it."""
    output = tmp_path / "record.json"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "harness",
            "load",
            "--base-url",
            server.base_url,
            "--output",
            output,
            "--num-requests",
            "300",
            "--request-rate",
            "3",
            "--input-length",
            "100",
            "--output-length",
            "100",
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    for line in iter(lambda: process.stderr.read(200), ""):
        if re.search(r"[1-9]\d* in flight", line):
            break
    members = psutil.Process(server.pid).children(recursive=True)
    (engine,) = (p for p in members if "EngineCore" in " ".join(p.cmdline()))
    engine.kill()
    _, error = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "ended early: the server at" in error
    assert "Traceback" not in error
    record = json.loads(output.read_text())
    assert not record["complete"]
    assert record["counts"]["not_sent"] > 100
    assert record["counts"]["failed"] + record["counts"]["incomplete"] > 0
