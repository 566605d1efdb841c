"""The offline command, end to end, as a user runs it; and the README's own example."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def offline(folder, *arguments, **options):
    command = [sys.executable, "-m", "harness", "offline", "--context-length", "320"]
    command += ["--num-samples", "3", "--output-dir", str(folder), "--experiment-name", "e"]
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, cwd=folder, check=False, **options
    )


@pytest.fixture(scope="module")
def experiment(smollm2, canterbury, tmp_path_factory):
    folder = tmp_path_factory.mktemp("offline")
    methods = ["--methods", "dense", "h2o", "cab", "--sparsity", "0.5", "0.6"]
    done = offline(folder, *methods, "--num-runs", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "e", done


def test_every_file_is_there(experiment):
    folder, _ = experiment
    pairs = ["dense_s0", "h2o_s0.5", "h2o_s0.6", "cab_s0.5", "cab_s0.6"]
    expected = {f"{pair}_ctx320_seed{seed}.json" for pair in pairs for seed in (0, 1)}
    expected |= {"aggregated_results.json", "significance_tests.json", "perplexity.png"}
    assert {path.name for path in folder.iterdir()} == expected


def test_a_record_says_everything_about_its_run(experiment):
    folder, _ = experiment
    record = json.loads((folder / "h2o_s0.6_ctx320_seed1.json").read_text())
    for key in (
        "perplexity",
        "tokens_per_second",
        "peak_memory_mb",
        "process_peak_memory_mb",
        "avg_cache_size",
        "total_tokens",
        "runtime_seconds",
        "timestamp",
    ):
        assert record[key], key
    assert record["total_tokens"] == 3 * 319
    assert [window["num_predictions"] for window in record["windows"]] == [319] * 3
    assert [len(window["log_likelihoods"]) for window in record["windows"]] == [5] * 3
    assert record["specification"]["engine"]["prefill_chunk"] == 64
    assert record["specification"]["engine"]["eviction"]["score"] == "sum"
    assert {"vllm-kv-eviction", "torch", "python"} <= set(record["versions"])
    assert record["hardware"]["cpu"]
    # 320 tokens are 10 blocks, 4 may stay; a chunk of 2 comes on top, for each of 3 windows.
    eviction = record["windows"][0]["eviction"]
    assert eviction["peak_blocks"] == 6
    assert eviction["first_eviction_tokens"] == 192
    assert eviction["blocks_evicted"] == 4
    bytes_per_block = 30 * 2 * 3 * 64 * 32 * 4
    assert record["peak_memory_mb"] == 3 * 6 * bytes_per_block / 2**20


def test_eviction_costs_and_saves(experiment):
    results = json.loads((experiment[0] / "aggregated_results.json").read_text())
    dense, evicted = results["dense_s0"], results["h2o_s0.6"]
    assert evicted["num_runs"] == 2
    assert evicted["perplexity"]["mean"] != dense["perplexity"]["mean"]
    assert evicted["peak_memory_mb"]["mean"] < 0.7 * dense["peak_memory_mb"]["mean"]
    tests = json.loads((experiment[0] / "significance_tests.json").read_text())
    assert tests["h2o_vs_cab_s0.6"]["all_tokens"]["num_windows"] == 6


def test_it_shows_progress_and_a_table(experiment):
    _, done = experiment
    assert "30/30" in done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith(("dense", "h2o", "cab"))]
    assert len(table) == 5
    assert "Traceback" not in done.stderr


def test_an_experiment_is_never_overwritten(experiment):
    done = offline(experiment[0].parent, "--methods", "dense")
    assert done.returncode == 2
    assert "give another --experiment-name" in done.stderr


def test_interrupting_keeps_finished_runs(smollm2, canterbury, tmp_path):
    command = [sys.executable, "-m", "harness", "offline", "--methods", "dense", "h2o", "cab"]
    command += ["--context-length", "320", "--num-samples", "2", "--num-runs", "50"]
    command += ["--output-dir", str(tmp_path), "--experiment-name", "e"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    record = tmp_path / "e" / "dense_s0_ctx320_seed0.json"
    deadline = time.monotonic() + 240
    while not record.exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()[-2000:]
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "finished runs are kept" in error
    assert "Traceback" not in error
    assert json.loads(record.read_text())["perplexity"] > 1
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_the_readmes_policy_works(smollm2, canterbury, tmp_path):
    """Section "Add a policy": its two files, installed as a package, on the engine."""
    readme = (ROOT / "README.md").read_text()
    section = readme.split("## Add a policy", 1)[1].split("\n## ", 1)[0]
    code, project = re.findall(r"```(?:python|toml)\n(.*?)```", section, re.DOTALL)
    assert len(code.splitlines()) <= 20
    entry = re.search(r'"kv_eviction.policies"\]\n(.+) = "(.+)"', project)
    name, target = entry.groups()
    module = target.split(":")[0]
    (tmp_path / f"{module}.py").write_text(code)
    metadata = tmp_path / f"{module}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[kv_eviction.policies]\n{name} = {target}\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = offline(tmp_path, "--methods", name, "--sparsity", "0.6", env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "e" / f"{name}_s0.6_ctx320_seed0.json").read_text())
    assert record["windows"][0]["eviction"]["blocks_evicted"] == 4
