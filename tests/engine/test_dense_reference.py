"""Dense perplexity against an independent tool: Transformers, on the very same windows."""

import json
import math

import pytest
import torch

from harness.analysis.perplexity import perplexity, total

from ..conftest import ROOT
from .conftest import offline


def test_dense_perplexity_equals_transformers(smollm2, canterbury, tmp_path):
    done = offline(tmp_path, "--methods", "dense", "--num-samples", "4", "--context-length", "512")
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "e" / "dense_s0.0_ctx512_seed0.json").read_text())
    assert record["perplexity"] == pytest.approx(
        reference(smollm2, canterbury, [w["start"] for w in record["windows"]], 512), rel=0.005
    )


def test_the_committed_evaluation_agrees_with_transformers(smollm2, wiki_test):
    """What a GPU measured in bfloat16, in chunks, against one pass in float32 here."""
    folder = ROOT / "results" / "full-evaluation" / "dataset=text-wiki.test.raw"
    record = json.loads((folder / "dense_s0_ctx2048_seed0.json").read_text())
    windows = record["windows"][::25]
    assert len(windows) == 2
    starts = [window["start"] for window in windows]
    assert perplexity(map(total, windows)) == pytest.approx(
        reference(smollm2, wiki_test, starts, 2048), rel=0.005
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
