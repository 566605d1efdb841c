"""A small random Llama, made where the test runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def make_llama(folder: Path, **overrides: Any) -> str:
    """By default with SmolLM2's head shape; returns the folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = {
        "vocab_size": 512,
        "hidden_size": 576,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "initializer_range": 0.08,
        "tie_word_embeddings": False,
        **overrides,
    }
    LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)
