"""The offline command, end to end, as a user runs it; and the README's own example.

What is tested of a sweep is not the model, so it is a small random one.
"""

import json
import os
import random
import signal
import subprocess
import time

import pytest

from harness.cli import main
from harness.records.stored import read_record

from .conftest import HARNESS, OFFLINE, SWEEP, TINY, offline

FIGURES = ("perplexity", "throughput", "memory", "position", "cache", "differences")


def test_every_file_is_there(experiment):
    folder, _ = experiment
    pairs = ["dense_s0.0", "h2o_s0.5", "h2o_s0.6", "cab_s0.5", "cab_s0.6"]
    expected = {f"{pair}_ctx320_seed{seed}.json" for pair in pairs for seed in (0, 1)}
    expected |= {f"{pair}_ctx320_load0.json" for pair in pairs}
    expected |= {f"{figure}.{kind}" for figure in FIGURES for kind in ("png", "svg")}
    expected |= {"aggregated_results.json", "significance_tests.json", "curves.json"}
    expected |= {"experiment.json", "report.md", "report.html"}
    assert {path.name for path in folder.iterdir()} == expected


def test_a_record_says_everything_about_its_run(experiment):
    folder, _ = experiment
    record = read_record(folder / "h2o_s0.6_ctx320_seed1.json")
    for key in (
        "perplexity",
        "tokens_per_second",
        "peak_memory_mib",
        "process_peak_memory_mib",
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
    assert record["specification"]["engine"]["eviction"]["score"] == "mean"
    assert record["effective_sparsity"] == pytest.approx(0.6)
    assert len(record["specification_hash"]) == len(record["code"]) == 16
    assert {"vllm-kv-eviction", "torch", "python"} <= set(record["versions"])
    assert record["hardware"]["cpu"]
    # 320 tokens are 10 blocks, 4 may stay; a chunk of 2 comes on top, for each of 3 windows.
    eviction = record["windows"][0]["eviction"]
    assert eviction["peak_blocks"] == 6
    assert eviction["first_eviction_tokens"] == 192
    assert eviction["blocks_evicted"] == 4
    assert record["blocks_evicted"] == 3 * 4
    assert (record["preemptions"], record["device_memory_mib"]) == (0, None)
    # The pool after each of 5 steps: what is held, and never more than the chunk above it.
    assert record["cache_trace"]["tokens"] == [64, 128, 192, 256]
    assert record["cache_trace"]["blocks"] == [2.0, 4.0, 6.0, 6.0]
    heads = TINY["num_hidden_layers"] * TINY["num_key_value_heads"]
    bytes_per_block = heads * 2 * TINY["head_dim"] * 32 * 4
    assert record["peak_memory_mib"] == 3 * 6 * bytes_per_block / 2**20


def test_eviction_costs_and_saves(experiment):
    results = json.loads((experiment[0] / "aggregated_results.json").read_text())
    dense, evicted = results["dense_s0.0"], results["h2o_s0.6"]
    assert evicted["num_runs"] == 2
    assert evicted["perplexity"]["mean"] != dense["perplexity"]["mean"]
    assert evicted["peak_memory_mib"]["mean"] < 0.7 * dense["peak_memory_mib"]["mean"]
    tests = json.loads((experiment[0] / "significance_tests.json").read_text())
    assert tests["h2o_vs_cab_s0.6"]["all_tokens"]["num_windows"] == 6


def test_throughput_comes_from_a_pass_of_its_own(experiment):
    folder, _ = experiment
    record = json.loads((folder / "h2o_s0.6_ctx320_load0.json").read_text())
    load = record["specification"]["load"]
    assert load == {"num_requests": 4, "prompt_tokens": 312, "output_tokens": 8}
    assert record["prefill_tokens_per_second"] * record["prefill_seconds"] == pytest.approx(4 * 312)
    assert record["output_tokens_per_second"] * record["load_seconds"] == pytest.approx(4 * 8)
    assert record["blocks_evicted"] > 0
    results = json.loads((folder / "aggregated_results.json").read_text())
    assert results["dense_s0.0"]["throughput"]["blocks_evicted"]["mean"] == 0


def test_it_shows_progress_and_a_table_of_each_pass(experiment):
    _, done = experiment
    # 10 runs of 3 windows, and 5 loads of 4 requests, twice each.
    assert "70/70" in done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(("dense", "h2o", "cab"))]
    assert len(rows) == 2 * 5
    perplexity, throughput = (
        line for line in done.stdout.splitlines() if line.startswith("method")
    )
    assert "perplexity" in perplexity
    assert "output tok/s" in throughput
    assert "Traceback" not in done.stderr


def test_time_goes_into_the_experiments_record(experiment):
    (session,) = json.loads((experiment[0] / "experiment.json").read_text())["sessions"]
    assert session["engine_starts"] == 1
    parts = ("engine_start_seconds", "measuring_seconds", "harness_seconds")
    assert sum(session[part] for part in parts) == pytest.approx(session["wall_seconds"], abs=0.01)
    assert session["measuring_seconds"] > 0


def test_a_different_experiment_of_the_same_name_is_refused(experiment, small_inputs, capsys):
    flags = (*small_inputs, "--methods", "dense", "--prefill-chunk", "32")
    assert main([*OFFLINE, "--output-dir", str(experiment[0].parent), *flags]) == 2
    error = capsys.readouterr().err
    assert "engine.prefill_chunk 64 there, 32 here" in error
    assert "give another --experiment-name" in error


def test_a_sweep_killed_twice_ends_in_the_report_of_an_undisturbed_one(
    experiment, small_inputs, tmp_path
):
    """Once politely, once not, at random moments; all but times and memory of processes equal."""
    folder, _ = experiment
    one_run = json.loads((folder / "h2o_s0.6_ctx320_seed1.json").read_text())["runtime_seconds"]
    seed = int.from_bytes(os.urandom(4), "little")
    rng = random.Random(seed)
    print(f"random moments of seed {seed}")
    for end, status in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        process = subprocess.Popen(
            [*HARNESS, *OFFLINE, "--output-dir", str(tmp_path), *small_inputs, *SWEEP],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        there = len(list(tmp_path.glob("e/*_ctx320_*.json")))
        wanted = there + rng.randint(1, 4)
        deadline = time.monotonic() + 240
        while len(list(tmp_path.glob("e/*_ctx320_*.json"))) < wanted:
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stderr.read()[-2000:]
            time.sleep(0.01)
        time.sleep(rng.random() * one_run)  # anywhere in the next run
        process.send_signal(end)
        _, error = process.communicate(timeout=60)
        assert process.returncode == status, error[-3000:]
        if end == signal.SIGINT:
            assert "finished runs are kept" in error
            assert "Traceback" not in error
            with pytest.raises(ProcessLookupError):
                os.killpg(process.pid, 0)
    done = offline(tmp_path, *small_inputs, *SWEEP)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "run(s) are there already" in done.stderr
    assert untimed(tmp_path / "e") == untimed(folder)


def untimed(folder):
    """What a report says and draws, but for the part that is about time."""
    said = (folder / "report.md").read_text().split("## Speed and time")[0]
    figures = {f: (folder / f"{f}.svg").read_bytes() for f in FIGURES if f != "throughput"}
    return said, (folder / "significance_tests.json").read_text(), figures


def test_the_readmes_policy_works(evaluation, readme_policy):
    """Section "Add a policy": its two files, installed as a package, on the engine."""
    record = evaluation[readme_policy[0]]
    assert record["windows"][0]["eviction"]["blocks_evicted"] == 4
