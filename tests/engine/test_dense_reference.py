"""Dense perplexity against an independent tool: Transformers, on the very same windows."""

import json
import math

import pytest
import torch

from .test_offline import offline


def test_dense_perplexity_equals_transformers(smollm2, canterbury, tmp_path):
    done = offline(tmp_path, "--methods", "dense", "--num-samples", "4", "--context-length", "512")
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "e" / "dense_s0_ctx512_seed0.json").read_text())
    assert record["perplexity"] == pytest.approx(
        reference(smollm2, canterbury, [w["start"] for w in record["windows"]], 512), rel=0.005
    )


def reference(folder, text, starts, length):
    """Perplexity of the windows by Transformers in float32, one forward pass a window."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = []
    for start in starts:
        window = torch.tensor([tokens[start : start + length]])
        with torch.inference_mode():
            losses.append(model(window, labels=window).loss.item())
    return math.exp(sum(losses) / len(losses))
