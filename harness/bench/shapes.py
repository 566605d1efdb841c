"""Models whose shapes the kernels are measured with."""

from __future__ import annotations

SHAPES = {
    "llama-3.1-8b": {"heads": 32, "kv_heads": 8, "head_size": 128, "layers": 32},
    "smollm2-135m": {"heads": 9, "kv_heads": 3, "head_size": 64, "layers": 30},
}
ELEMENT_BYTES = 2
"""Of keys and values: bfloat16."""
