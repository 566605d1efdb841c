"""Every kind of record begins alike, and records of former times are read under today's names."""

import json
from pathlib import Path

import pytest

from harness.records.former_names import load_in_todays_names
from harness.records.head import record_head
from harness.records.serving import read_serving_record
from harness.study.bench_study import BenchStudy
from harness.study.plan import comparisons
from harness.study.serving_study import ServingStudy
from harness.study.settings import Study

RESULTS = Path(__file__).resolve().parents[2] / "results"
LOAD = {"num_requests": 3, "input_length": 448, "output_length": 64}


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return str(tmp_path / "model")


@pytest.fixture
def runs(model):
    """A run of each kind: h2o at 0.9, requests or windows of 512 tokens, blocks of 32."""
    h2o = {"model": model, "methods": ["h2o"], "sparsity": [0.9]}
    offline = Study.parse({**h2o, "context_length": 512, "throughput": True})
    (point,) = comparisons(offline, Path("out"), "cpu")
    batch = {"num_requests": 2, "prompt_tokens": 448, "output_tokens": 64}
    return {
        "perplexity": point.runs[0],
        "throughput": point.runs[1],
        "serving": ServingStudy.parse({**h2o, "load": LOAD, "rates": [4]}).runs()[0],
        "batch": BenchStudy.parse({**h2o, "load": batch}).runs()[0],
    }


@pytest.mark.parametrize("kind", ["perplexity", "throughput", "serving", "batch"])
def test_a_record_of_any_kind_begins_alike(runs, kind):
    head = record_head(runs[kind], 3)
    assert head.pop("timestamp").startswith("20")
    assert len(head.pop("specification_hash")) == 16
    assert head == {
        "schema_version": 3,
        "kind": kind,
        "key": "h2o_s0.9_rate4" if kind == "serving" else "h2o_s0.9",
        "method": "h2o",
        "policy": "h2o",
        "parameters": {
            "recent": 0.2,
            "heavy": 0.8,
            "selection": "head",
            "value_weighted": False,
        },
        "sparsity": 0.9,
        "budget_tokens": None,
        "level": "s0.9",
        "effective_sparsity": 0.75,  # 4 of 16 blocks always stay
        "seed": 0,
    }


def test_a_record_says_what_a_default_meant(model):
    def bridges(study):
        load = {"num_requests": 2, "prompt_tokens": 448, "output_tokens": 64}
        study = {"model": model, "sparsity": [0.9], "load": load, **study}
        runs = BenchStudy.parse(study).runs()
        return [record_head(run, 3)["parameters"].get("bridge_definition") for run in runs]

    blocks = {"policy": "cab", "granularity": "block", "name": "cab-blocks"}
    peaks = {"policy": "cab", "name": "cab-peak", "args": {"bridge_definition": "peak"}}
    found = bridges({"methods": ["stock", "h2o", "cab", blocks, peaks]})
    assert found == [None, None, "key_difference", "median", "peak"]
    of_engine = {"policy_args": {"cab": {"bridge_definition": "mass"}}}
    assert bridges({"methods": ["stock", "cab"], "eviction": of_engine})[1:] == ["mass"]


def test_a_load_without_a_single_length_has_no_effective_sparsity(model):
    for changes in ({"input_length": "uniform:100:400"}, {"quality": {"share": 0.5}}):
        study = {"model": model, "methods": ["dense", "h2o"], "load": {**LOAD, **changes}}
        dense, h2o = ServingStudy.parse(study).runs()
        assert (dense.effective_sparsity, h2o.effective_sparsity) == (0.0, None)


def test_what_runs_are_stored_as_is_as_it_was(runs):
    assert set(runs["perplexity"].to_dict()) == {
        "dataset",
        "engine",
        "method",
        "text",
        "seed",
        "sparsity",
        "budget_tokens",
        "num_samples",
        "min_context",
        "load",
    }
    committed = json.loads((RESULTS / "serving-cpu" / "h2o_s0.9_rate1_seed0.json").read_text())
    assert set(committed["run"]) - {"hash"} <= set(runs["serving"].to_dict())
    assert runs["serving"].to_dict()["load"]["request_rate"] == 4


def test_a_load_of_former_times_told_the_share_under_another_name():
    record = json.loads((RESULTS / "first-command" / "cpu.json").read_text())
    share = record["memory"]["effective_sparsity"]
    memory = load_in_todays_names(record)["memory"]
    assert memory["evicted_share"] == share
    assert "effective_sparsity" not in memory


def test_a_serving_record_of_former_times_has_todays_head():
    record = read_serving_record(RESULTS / "serving-gpu-8b" / "h2o_s0.9_rate4_seed0.json")
    assert record["key"] == "h2o_s0.9_rate4"
    assert (record["method"], record["policy"], record["level"]) == ("h2o", "h2o", "s0.9")
    assert record["effective_sparsity"] is None
