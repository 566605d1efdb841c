"""Random models whose layers alternate between full attention and a window, and what the oracles
have to know of them."""

from __future__ import annotations

from typing import Any

import torch

from .conftest import TINY

WINDOW = 96
MODELS = ("gemma2", "gemma3", "gpt_oss", "mistral")


def make(kind: str, **overrides: Any) -> Any:
    """A Transformers model in float32 with eager attention. ``overrides``: of ``TINY``.

    - ``gemma2``: every other layer has the window; logits are capped softly.
    - ``gemma3``: five of six layers have it, so vLLM makes six KV-cache groups.
    - ``gpt_oss``: every other layer; each head has a learned sink.
    - ``mistral``: two of five, so vLLM splits the other three into two groups, of two and of one.
    """
    import transformers as t

    torch.manual_seed(0)
    common = {**TINY, "sliding_window": WINDOW, **overrides}
    gemma = {**common, "tie_word_embeddings": True, "query_pre_attn_scalar": 32}
    if kind == "gemma2":
        config = t.Gemma2Config(**gemma, attn_logit_softcapping=4.0)
        model = t.Gemma2ForCausalLM(config)
    elif kind == "gemma3":
        model = t.Gemma3ForCausalLM(t.Gemma3TextConfig(**{**gemma, "num_hidden_layers": 6}))
    elif kind == "gpt_oss":
        config = t.GptOssConfig(**common, num_local_experts=4, num_experts_per_tok=2)
        model = t.GptOssForCausalLM(config)
        for layer in model.model.layers:
            # As large as the largest logits: a softmax without them would be another.
            torch.nn.init.uniform_(layer.self_attn.sinks, 1.0, 5.0)
    else:
        model = t.MistralForCausalLM(t.MistralConfig(**{**common, "num_hidden_layers": 5}))
        model.config.layer_types = ["sliding_attention", "full_attention", "full_attention"] * 2
        model.config.layer_types.pop()
    model = model.float().eval()
    model.set_attn_implementation("eager")
    return model


def full_layers(config: Any) -> list[int]:
    """The layers that attend to all tokens."""
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [layer for layer, kind in enumerate(types) if kind == "full_attention"]


def pass_windows(cache: Any, config: Any) -> None:
    """Drop from a cache what the next token does not see in layers with a window."""
    for layer in set(range(len(cache.layers))) - set(full_layers(config)):
        entry = cache.layers[layer]
        entry.keys = entry.keys[:, :, 1 - config.sliding_window :]
        entry.values = entry.values[:, :, 1 - config.sliding_window :]
