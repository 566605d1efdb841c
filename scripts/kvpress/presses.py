"""The presses that are compared, each under the name of its records. Knows kvpress alone."""

from __future__ import annotations

from typing import Any

import kvpress

PRESSES: dict[str, tuple[str, dict[str, Any]]] = {
    "streaming_llm": ("StreamingLLMPress", {"n_sink": 4}),
    "observed_attention": ("ObservedAttentionPress", {}),
    "snapkv": ("SnapKVPress", {}),
    "snapkv-32": ("SnapKVPress", {"window_size": 32}),
    "keydiff": ("KeyDiffPress", {}),
    "expected_attention": ("ExpectedAttentionPress", {}),
    "knorm": ("KnormPress", {}),
    "tova": ("TOVAPress", {}),
}
"""Class and arguments. What is not named is kvpress's default; records have all of them."""
NEEDS_ATTENTION = frozenset({"observed_attention"})
"""Presses that read attention weights, which only eager attention gives."""


def press_of(name: str, compression_ratio: float) -> Any:
    """A press that takes ``compression_ratio`` of a prompt's tokens away."""
    kind, arguments = PRESSES[name]
    return getattr(kvpress, kind)(compression_ratio=compression_ratio, **arguments)
