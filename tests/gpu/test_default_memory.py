"""The first command on a GPU: no memory flag, vLLM measures what it may take."""

import json
import keyword
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.cli import main
from harness.resources.server import free_port, serving

from ..child import child
from .models import make_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
H2O = {"policy": "h2o", "sparsity": 0.9}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    ("engine", "settings", "groups"),
    [
        ({}, H2O, 1),
        ({"gpu_memory_utilization": 0.95}, {**H2O, "layer_groups": 3}, 3),
    ],
    ids=["default", "0.95, three groups"],
)
def test_an_engine_starts_captures_and_serves(engine, settings, groups, model, tmp_path):
    output = tmp_path / "output.json"
    arguments = (model, json.dumps(engine), json.dumps(settings), str(output))
    with child("tests.gpu.default_memory", *arguments) as process:
        assert process.wait(timeout=240) == 0
    made = json.loads(output.read_text())
    assert made["tokens"] == [40] * 300
    assert min(made["evicted"]) > 60
    assert made["groups"] == groups
    assert made["idle_blocks"] == made["num_blocks"] - 1
    assert made["cudagraph_mode"] == "FULL_AND_PIECEWISE"
    limit = engine.get("gpu_memory_utilization", 0.92)
    assert limit - 0.05 < made["memory_used"] < limit + 0.04


def test_the_serve_command_starts_and_is_loaded(smollm2, tmp_path):
    command = [
        sys.executable,
        "-m",
        "harness",
        "serve",
        smollm2,
        "--policy",
        "h2o",
        "--sparsity",
        "0.9",
        "--served-model-name",
        "smollm2",
    ]
    log, record, text = (tmp_path / name for name in ("log", "record.json", "text.txt"))
    words = np.random.default_rng(0).choice(sorted(set(keyword.kwlist)), size=60_000)
    text.write_text(" ".join(words))  # the machine may reach no package registry
    with serving(command, free_port(), log, startup_timeout_s=240) as server:
        status = main(
            [
                "load",
                "--base-url",
                server.base_url,
                "--output",
                str(record),
                "--num-requests",
                "200",
                "--request-rate",
                "40",
                "--input-length",
                "1500",
                "--output-length",
                "100",
                "--quality-share",
                "0.05",
                "--quality-context-length",
                "2048",
                "--quality-dataset",
                f"text:{text}",
            ]
        )
        with urllib.request.urlopen(f"{server.base_url}/metrics", timeout=30) as response:
            metrics = response.read().decode()
    assert status == 0
    made = json.loads(Path(record).read_text())
    assert made["counts"]["succeeded"] == 200
    assert made["quality"]["num_answered"] == 10
    assert made["memory"]["kv_eviction_blocks_evicted"] > 1000
    assert "vllm:kv_eviction_policy_errors_total" in metrics
