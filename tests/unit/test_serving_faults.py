"""Whatever happens to server or user: the right count and message, a record, an exit status."""

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time

import pytest

from harness.cli import main
from harness.client.load_plan import make_plan
from harness.client.load_settings import LoadSpecification
from harness.client.target import find_target
from harness.measure.load import run_load
from harness.resources.server import free_port

from .serving_stub import GATHERED, load, running


def test_a_good_server(tmp_path, capsys):
    with running() as (address, stub):
        status, record = load(
            address,
            tmp_path,
            "--kv-policy",
            "cab",
            "--kv-sparsity",
            "0.9",
            "--slo",
            "time_to_first_token_ms:5000",
        )
    assert status == 0
    assert record["complete"]
    assert record["schema_version"] == 2
    assert record["counts"]["succeeded"] == 6
    assert record["requests"]["output_tokens"] == [5] * 6
    summary = record["summary"]["all"]
    assert summary["goodput"] == summary["request_throughput"] > 0
    assert summary["time_per_output_token_ms"]["count"] == 6
    assert record["memory"]["num_gpu_blocks"] == 10
    assert record["samples"]["kv_cache_usage"][0] == 0.5
    assert stub.bodies[0]["vllm_xargs"] == {"kv_policy": "cab", "kv_sparsity": 0.9}
    assert "6 of 6 requests succeeded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mode", "kind", "error", "message"),
    [
        ("http_500", "failed", "http_500", "the engine is on fire"),
        ("malformed", "failed", "malformed_stream", "not a completion chunk: {half a chu"),
        ("error_event", "failed", "error_in_stream", "out of luck"),
        ("close", "incomplete", "connection_closed", "closed mid-stream"),
        ("no_done", "incomplete", "stream_ended", "without [DONE]"),
        ("hang", "timed_out", "timed_out", "no end within 0.5 s"),
    ],
)
def test_each_fault_has_its_count_and_message(mode, kind, error, message, tmp_path, capsys):
    with running(mode, after=2) as (address, _):
        timeout = "0.5" if mode == "hang" else "30"
        status, record = load(address, tmp_path, "--timeout", timeout)
    assert status == 1
    assert record["complete"]
    assert record["counts"] == {
        "planned": 6,
        "failed": 0,
        "timed_out": 0,
        "incomplete": 0,
        "not_sent": 0,
        "succeeded": 2,
        kind: 4,
    }
    (row,) = record["failures"]
    assert (row["status"], row["error"], row["count"]) == (kind, error, 4)
    assert message in row["message"]
    assert len(record["not_succeeded"]) == 4
    assert record["summary"]["all"]["time_to_first_token_ms"]["count"] == 2
    assert f"4 x {error}: " in capsys.readouterr().out


def test_answers_without_the_log_probs_that_were_asked_for(tmp_path):
    specification = LoadSpecification.parse(
        {
            "num_requests": 4,
            "input_length": 4,
            "output_length": 2,
            "quality": {"share": 0.5, "context_length": 8, "num_windows": 1},
        }
    )
    plan = make_plan(specification, 100, lambda dataset: list(range(100)))
    with running() as (address, _):
        target = asyncio.run(find_target(address, None))
        record = run_load(specification, plan, target, progress=False).record
    assert (record["counts"]["succeeded"], record["counts"]["failed"]) == (2, 2)
    (row,) = record["failures"]
    assert row["error"] == "malformed_answer"
    assert row["message"].startswith("no prompt log-probs in: ")
    assert (record["quality"]["num_asked"], record["quality"]["num_answered"]) == (2, 0)


def test_tokens_of_a_broken_stream_are_counted_but_no_latency(tmp_path):
    with running("close") as (address, _):
        _, record = load(address, tmp_path)
    assert [row["output_tokens"] for row in record["not_succeeded"]] == [2] * 6
    assert record["summary"]["all"]["time_to_first_token_ms"] is None


def stub_process(mode, port, *arguments):
    command = [sys.executable, "-m", "tests.unit.serving_stub", mode, "--port", str(port)]
    process = subprocess.Popen([*command, *arguments])
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.1)
    raise AssertionError("the stub did not start")


def test_a_server_that_dies_ends_the_run(tmp_path, capsys):
    port = free_port()
    process = stub_process("die", port, "--after", "3")
    started = time.monotonic()
    status, record = load(f"http://127.0.0.1:{port}", tmp_path, "--request-rate", "5", requests=200)
    process.wait(10)
    assert time.monotonic() - started < 15, "the run does not wait for the remaining requests"
    assert status == 1
    assert not record["complete"]
    assert "is gone" in record["stop_reason"]
    counts = record["counts"]
    assert counts["succeeded"] == 3
    assert counts["not_sent"] > 150
    assert sum(counts.values()) == 2 * 200
    assert "ended early: the server at" in capsys.readouterr().err


def test_interrupting_keeps_the_record(tmp_path):
    with running("slow") as (address, stub):
        output = tmp_path / "record.json"
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "harness",
                "load",
                "--base-url",
                address,
                "--output",
                output,
                "--num-requests",
                "50",
                "--request-rate",
                "5",
                "--vocab-size",
                "10",
                "--input-length",
                "3",
                "--output-length",
                "5",
            ],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 30
        while stub.count < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "interrupted; the record is kept" in error
    assert "Traceback" not in error
    record = json.loads(output.read_text())
    assert record["stop_reason"] == "interrupted"
    assert record["counts"]["incomplete"] > 0
    assert record["counts"]["not_sent"] > 0


def test_nobody_answers(tmp_path, capsys):
    address = f"http://127.0.0.1:{free_port()}"
    status, record = load(address, tmp_path)
    assert status == 2
    assert record is None
    assert f"no OpenAI server answers at {address}" in capsys.readouterr().err


def test_a_model_the_server_does_not_have(tmp_path, capsys):
    with running() as (address, _):
        assert load(address, tmp_path, "--model", "other")[0] == 2
    assert "does not serve other; it serves: stub" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_shows_before_the_run(tmp_path, capsys):
    with running() as (address, stub):
        assert (
            main(
                [
                    "load",
                    "--base-url",
                    address,
                    "--num-requests",
                    "1",
                    "--output",
                    "/proc/none/r.json",
                ]
            )
            == 2
        )
    assert stub.count == 0
    assert "cannot write to /proc/none/r.json" in capsys.readouterr().err


def test_serve_refuses_a_port_that_is_taken(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        arguments = ["serve", str(tmp_path), "--host", "127.0.0.1", "--port", str(port)]
        assert main(arguments) == 2
    error = capsys.readouterr().err
    assert f"port {port} of 127.0.0.1 cannot be used (Address already in use)" in error


def test_serve_refuses_a_model_path_that_is_wrong(capsys):
    assert main(["serve", "/nowhere/model", "--port", str(free_port())]) == 2
    assert "/nowhere/model holds no config.json" in capsys.readouterr().err


def test_closed_loop_keeps_its_concurrency(tmp_path):
    with running("slow") as (address, _):
        status, record = load(
            address,
            tmp_path,
            "--arrivals",
            "closed",
            "--max-concurrency",
            "3",
            "--request-rate",
            "inf",
            requests=7,
        )
    assert status == 0
    assert record["summary"]["all"]["peak_concurrency"] == 3
    assert record["requests"]["intended_s"] == []
    assert record["requests"]["sent_s"][3] > 0.9, "the fourth waits for the first three"


def test_more_requests_in_flight_than_a_process_may_open_files_by_default(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Of this process's own, which may hold many by now, and of half as many as are asked for.
    few = len(os.listdir("/proc/self/fd")) + GATHERED // 2
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    try:
        with running("gather") as (address, _):
            rate = ("--request-rate", "inf", "--timeout", "60")
            status, record = load(address, tmp_path, *rate, requests=GATHERED)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert status == 0, record["failures"]
    assert record["summary"]["all"]["peak_concurrency"] == 120


def test_a_client_that_falls_behind_says_so(tmp_path, monkeypatch):
    from harness.client import loops

    def launch(self, request, original=loops.LoadLoop._launch):
        time.sleep(0.02)  # the event loop is busy for twice the gap between requests
        original(self, request)

    monkeypatch.setattr(loops.LoadLoop, "_launch", launch)
    with running() as (address, _):
        _, record = load(
            address, tmp_path, "--arrivals", "constant", "--request-rate", "100", requests=50
        )
    summary = record["summary"]["all"]
    assert summary["send_lag_ms"]["p50"] > 100
    # No coordinated omission: the delay is in the latency.
    assert summary["time_to_first_token_ms"]["p50"] > 100
    assert "the client fell behind" in record["warnings"][0]
