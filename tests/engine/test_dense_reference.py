"""Dense perplexity against an independent tool: Transformers, on the very same windows."""

import math

import pytest

from harness.analysis.perplexity import perplexity, total

from .conftest import transformers_losses, windows_of


def test_dense_perplexity_equals_transformers(evaluation, smollm2, canterbury):
    record = evaluation["dense"]
    starts = [window["start"] for window in record["windows"]]
    losses = transformers_losses(smollm2, windows_of(smollm2, canterbury, starts, 320))
    assert record["perplexity"] == pytest.approx(math.exp(sum(losses) / 4), rel=0.005)


def test_the_committed_evaluation_agrees_with_transformers(wiki_windows, wiki_losses):
    """What a GPU measured in bfloat16, in chunks, against one pass in float32 here."""
    windows, _ = wiki_windows
    assert perplexity(map(total, windows)) == pytest.approx(
        math.exp(sum(wiki_losses) / 2), rel=0.005
    )
