"""kvpress's side of scripts/kvpress against plain attention over what is said to be kept."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from harness.inputs.windows import tokens_sha256

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-kvpress" / "bin" / "python"
PROMPT, LENGTH, KEPT, SINKS = 128, 200, 32, 4


@pytest.fixture
def records(tiny_llama, tmp_path):
    """Records of dense and StreamingLLM over two windows, and the windows."""
    if not PYTHON.is_file():
        pytest.skip("kvpress has an environment of its own: scripts/kvpress/setup makes it")
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(0, 256, (2, LENGTH), generator=generator).tolist()
    exported = {
        "schema_version": 1,
        "kind": "windows",
        "model": "tiny",
        "text": {"dataset": "random"},
        "context_length": LENGTH,
        "min_context": PROMPT + 1,
        "runs": [
            {
                "seed": 0,
                "tokens_sha256": tokens_sha256(windows),
                "windows": [{"start": i, "tokens": w} for i, w in enumerate(windows)],
            }
        ],
    }
    file = tmp_path / "windows.json"
    file.write_text(json.dumps(exported))
    command = [PYTHON, ROOT / "scripts" / "kvpress" / "run.py", "--windows", file]
    command += ["--model", tiny_llama[0], "--output", tmp_path / "made", "--device", "cpu"]
    command += ["--presses", "streaming_llm", "observed_attention", "--ratios", "0.75"]
    subprocess.run(command, check=True, timeout=300, capture_output=True, text=True)
    made = [json.loads(path.read_text()) for path in (tmp_path / "made").glob("*.json")]
    return {record["method"]: record for record in made}, windows


def reference(model, window, hidden):
    """Summed log-likelihood of the tokens behind the prompt, whose queries miss ``hidden``."""
    size = len(window)
    sees = torch.ones(size, size, dtype=torch.bool).tril()
    sees[PROMPT:, hidden] = False
    mask = torch.zeros(size, size).masked_fill(~sees, torch.finfo(torch.float32).min)
    with torch.no_grad():
        logits = model(torch.tensor([window]), attention_mask=mask[None, None]).logits[0]
    logs = logits[PROMPT:-1].log_softmax(-1)
    return float(logs.gather(1, torch.tensor(window[PROMPT + 1 :])[:, None]).sum())


def test_presses_score_as_attention_that_misses_what_they_drop(records, tiny_llama):
    made, windows = records
    assert {name: record["kept_tokens"] for name, record in made.items()} == {
        "dense": PROMPT,
        "streaming_llm": KEPT,
        "observed_attention": KEPT,
    }
    assert made["observed_attention"]["attention"] == "eager"
    dropped = list(range(SINKS, PROMPT - KEPT + SINKS))
    for name, hidden in (("dense", []), ("streaming_llm", dropped)):
        for entry, window in zip(made[name]["windows"], windows, strict=True):
            expected = reference(tiny_llama[1], window, hidden)
            assert sum(entry["log_likelihoods"]) == pytest.approx(expected, abs=2e-3)
            assert entry["num_predictions"] - entry["num_unscored"] == LENGTH - PROMPT - 1
