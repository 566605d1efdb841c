"""A cache of 8-bit numbers on CUDA: what they are, and what they count.

vLLM's FlashAttention backend keeps e4m3 in a cache of bytes and views them where it reads them
(``vllm/v1/attention/backends/flash_attn.py``). Its attention layer quantises queries before the
backend sees them (``vllm/model_executor/layers/attention/attention.py``). Queries, keys and values
have a scale each: one for a layer, 1 unless the checkpoint says otherwise, or one for each KV head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

FLOAT8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Scales:
    """What a layer's numbers count: float32 of one element, or of one a KV head.

    They are vLLM's own tensors: a captured graph reads what they hold when it runs.

    Attributes:
        key, value: of the cache.
        query: None where queries are not quantised.

    """

    key: torch.Tensor
    value: torch.Tensor
    query: torch.Tensor | None

    @classmethod
    def of(cls, layer: Any) -> Scales | None:
        """Those of an attention layer of vLLM; None: its cache is not quantised."""
        if not is_quantised(layer.kv_cache):
            return None
        query = layer._q_scale if layer.impl.supports_quant_query_input else None
        return cls(layer._k_scale, layer._v_scale, query)


def is_quantised(kv_cache: torch.Tensor) -> bool:
    """Whether a layer's cache is one of bytes; of the types that are not refused, e4m3 alone is."""
    return kv_cache.dtype == torch.uint8


def numbers(kv_cache: torch.Tensor) -> torch.Tensor:
    """A cache as numbers: a view of type ``FLOAT8`` of one of bytes, others as they are."""
    return kv_cache.view(FLOAT8) if is_quantised(kv_cache) else kv_cache


def dequantised(part: torch.Tensor, scale: torch.Tensor | None, heads: slice) -> torch.Tensor:
    """Keys or values as attention sees them, float32.

    Args:
        part: ``[requests, heads, tokens, head_size]``, numbers of a cache.
        scale: of the layer, all heads; None: 1.
        heads: those of ``part``.

    """
    if scale is None:
        return part.float()
    own = scale if scale.numel() == 1 else scale[heads].view(-1, 1, 1)
    return part.float() * own
