"""Windows as long as the model's positions, to the last token."""

import random

import pytest
import torch

from harness.resources import launch
from harness.study.settings import ALL_SCORES
from harness.study.specification import EngineSpecification
from vllm_plugins.config import EvictionConfig


def test_the_last_position_is_scored_as_transformers_does(tiny_llama, no_engine, monkeypatch):
    folder, model = tiny_llama
    length = model.config.max_position_embeddings
    eviction = EvictionConfig.parse({"policy": "dense", **ALL_SCORES}).to_dict()
    specification = EngineSpecification(
        "tiny", "", length, 64, 32, 4, 2, True, eviction=eviction, model_path=folder
    )
    arguments = launch._arguments
    monkeypatch.setattr(  # the random model has no tokenizer
        launch, "_arguments", lambda s: {**arguments(s), "skip_tokenizer_init": True}
    )
    rng = random.Random(0)
    window = [rng.randrange(model.config.vocab_size) for _ in range(length)]
    with launch.running(specification) as engine:
        scored = engine.score([window], {"kv_policy": "dense"})
    with torch.no_grad():
        logits = model(torch.tensor([window])).logits[0, :-1].double()
    wanted = torch.log_softmax(logits, -1).gather(1, torch.tensor(window[1:])[:, None])[:, 0]
    assert scored.windows[0].log_likelihoods == pytest.approx(wanted.tolist(), abs=1e-3)
