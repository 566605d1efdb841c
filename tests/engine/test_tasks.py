"""Tasks on a real engine and model, as a user asks for them."""

import json
import os

import pytest

from harness.records.stored import read_record

from .conftest import offline

DRAWN = 8


@pytest.fixture(scope="module")
def folder(smollm2, canterbury, no_engine_of_the_process, tmp_path_factory):
    """Needles in the embedded text, and a file of prompts of very different lengths."""
    made = tmp_path_factory.mktemp("tasks")
    filler = " ".join(canterbury[10_000:14_000].split()[:-1])
    rows = [
        {"prompt": "The capital of France is", "answers": ["Paris"], "max_tokens": 8},
        {"prompt": f"{filler} The capital of France is", "answers": ["Paris"], "max_tokens": 2},
        {"prompt": "Two and two is", "answers": ["zzz"], "metric": "f1", "max_tokens": 4},
    ]
    (made / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = offline(
        made,
        *("--tasks", "niah_single", f"jsonl:{made}/mine.jsonl"),
        *("--methods", "dense", "h2o", "streaming", "--sparsity", "0.5"),
        *("--context-length", "1024", "--task-samples", str(DRAWN)),
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "niah_single" in done.stdout
    return made / "e"


@pytest.fixture(scope="module")
def no_engine_of_the_process(engine_slot):
    engine_slot.leave()


@pytest.fixture(scope="module")
def cached(folder, tmp_path_factory):
    """The same needles, their prompts found in the prefix cache."""
    made = tmp_path_factory.mktemp("cached")
    done = offline(
        made,
        *("--tasks", "niah_single", "--task-prefix", "cached"),
        *("--methods", "dense", "h2o", "streaming", "--sparsity", "0.5"),
        *("--context-length", "1024", "--task-samples", str(DRAWN)),
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return made / "e"


def test_a_hit_answers_as_the_computed_prompt_where_nothing_is_evicted(folder, cached):
    first, second = (record(f, "dense_s0.0", "niah-single")["samples"] for f in (folder, cached))
    assert [s["answer"] for s in first] == [s["answer"] for s in second]
    assert not any("cached_tokens" in sample for sample in first)


@pytest.mark.parametrize(
    ("key", "own"), [("dense_s0.0", 1), ("h2o_s0.5", 32), ("streaming_s0.5", 1)]
)
def test_of_a_cached_prompt_only_the_end_is_computed(cached, key, own):
    for sample in record(cached, key, "niah-single")["samples"]:
        assert own <= sample["prompt_tokens"] - sample["cached_tokens"] < own + 32
        assert sample["eviction"]["num_steps"] == sample["answer_tokens"]
        assert bool(sample["eviction"]["blocks_evicted"]) == (key != "dense_s0.0")


def record(folder, key, task):
    return read_record(folder / f"{key}_ctx1024_task0_{task}.json")


def test_dense_finds_the_needle(folder):
    assert record(folder, "dense_s0.0", "niah-single")["score"] >= 0.75


@pytest.mark.parametrize("key", ["h2o_s0.5", "streaming_s0.5"])
def test_evicting_takes_the_steps_of_the_chunk_and_half_the_memory(folder, key):
    dense, made = (record(folder, k, "niah-single") for k in ("dense_s0.0", key))
    assert made["peak_memory_mib"] < 0.65 * dense["peak_memory_mib"]
    for sample, other in zip(made["samples"], dense["samples"], strict=True):
        steps = -(-sample["prompt_tokens"] // 64) + sample["answer_tokens"] - 1
        assert sample["eviction"]["num_steps"] == steps
        assert sample["eviction"]["blocks_evicted"] > 0
        assert sample["expected"] == other["expected"]
    assert made["score"] <= dense["score"]


def test_prompts_of_different_lengths_keep_to_the_chunk(folder):
    made = record(folder, "h2o_s0.5", "jsonl-mine.jsonl")
    short, long, other = made["samples"]
    assert long["prompt_tokens"] > 700
    assert short["eviction"]["num_steps"] == short["answer_tokens"]
    assert long["eviction"]["num_steps"] == -(-long["prompt_tokens"] // 64) + 1
    assert long["eviction"]["blocks_evicted"] > 0
    assert record(folder, "dense_s0.0", "jsonl-mine.jsonl")["samples"][0]["score"] == 1.0
    assert (other["metric"], other["score"]) == ("f1", 0.0)
