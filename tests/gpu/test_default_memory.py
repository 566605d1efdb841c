"""The first command on a GPU: no memory flag, vLLM measures what it may take."""

import json
import keyword
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from harness.cli import main
from harness.resources.server import free_port, serving

from ..child import child
from .default_memory import NUM_EVICTING
from .engines import NEEDS_GPU
from .models import make_llama

pytestmark = [*NEEDS_GPU, pytest.mark.usefixtures("no_engine")]
H2O = {"policy": "h2o", "sparsity": 0.9}
BY_BLOCK = {**H2O, "layer_groups": 3, "granularity": "block"}
CAB_BY_TOKEN = {"policy": "cab", "sparsity": 0.9, "granularity": "token"}
"""Keeps the mass and the peak of every token."""


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory):
    """A token takes 256 KiB of keys and values here, so that some hundred thousand fill a GPU."""
    return make_llama(
        tmp_path_factory.mktemp("wide"),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
    )


@pytest.mark.parametrize(
    ("model", "engine", "settings", "groups", "fill"),
    [
        ("llama", {}, H2O, 1, False),
        ("llama", {"gpu_memory_utilization": 0.95}, BY_BLOCK, 3, False),
        ("wide_llama", {"gpu_memory_utilization": 0.95}, CAB_BY_TOKEN, 1, True),
    ],
    ids=["default", "0.95, three groups", "0.95, by token, full pool"],
)
def test_an_engine_starts_captures_and_serves(
    model, engine, settings, groups, fill, request, tmp_path
):
    output = tmp_path / "output.json"
    given = [json.dumps(value) for value in (engine, settings, fill)]
    folder = request.getfixturevalue(model)
    with child("tests.gpu.default_memory", folder, *given, str(output)) as process:
        assert process.wait(timeout=360) == 0
    made = json.loads(output.read_text())
    print({name: value for name, value in made.items() if not isinstance(value, list)})
    assert made["answered"] == made["asked"]
    assert len(made["evicted"]) == NUM_EVICTING
    assert min(made["evicted"]) > 60
    assert made["granularity"] == [settings.get("granularity", "token")]
    assert made["policy_errors"] == []
    assert made["groups"] == groups
    assert made["idle_blocks"] == made["num_blocks"] - 1
    assert made["cudagraph_mode"] == "FULL_AND_PIECEWISE"
    if fill:
        assert made["peak_pool_share"] > 0.95
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
