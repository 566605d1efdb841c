"""What eviction can buy at best on a batch: prefill is arithmetic, decode moves bytes. Pure.

    time = prefill FLOPs / rate + sum over decode steps of (weights + live KV bytes) / bandwidth

Memory for keys and values limits how many requests decode together: ``C = pool / peak per
request``. ``N / C`` waves of ``output_tokens`` steps each; a step reads the weights once and every
live token's keys and values. Evicting shrinks the live tokens, so more requests share each read
of the weights *and* each read is smaller. The bound is a ratio to the dense time by the same
formula; what vLLM loses to launch gaps or sampling hits both sides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MODEL = "llama-3.1-8b"
"""The model whose sizes stand here."""
RATES = {
    # Measured: 8192^3 bf16 product and a device-to-device copy (bytes read + written).
    "H200": (790e12, 4.3e12),
    "H100": (790e12, 3.0e12),
}
PARAMETERS = 8.03e9
BYTES_PER_TOKEN = 32 * 2 * 8 * 128 * 2


def seconds(load: Mapping[str, Any], pool_tokens: float, sparsity: float, gpu: str) -> float:
    """Time of a batch at the roofline.

    Args:
        load: ``num_requests``, ``prompt_tokens`` and ``output_tokens`` of each.
        pool_tokens: tokens that the KV pool holds.
        sparsity: share of the blocks that is evicted.
        gpu: of ``RATES``.

    """
    flops, bandwidth = RATES[gpu]
    num_requests = load["num_requests"]
    prompt, output = load["prompt_tokens"], load["output_tokens"]
    attention = 4 * 32 * 32 * 128 * prompt * prompt / 2
    prefill = num_requests * (2 * PARAMETERS * prompt + attention) / flops
    live_end = (1 - sparsity) * (prompt + output)
    live_mean = (1 - sparsity) * (prompt + output / 2)
    together = max(1, min(num_requests, math.floor(pool_tokens / live_end)))
    steps = num_requests / together * output
    weights = 2 * PARAMETERS
    step = (weights + together * live_mean * BYTES_PER_TOKEN) / bandwidth
    return prefill + steps * step


def largest_ratio(record: Mapping[str, Any], stock: Mapping[str, Any]) -> float | None:
    """The largest ratio to stock vLLM that the GPU of a bench record allows.

    Args:
        record: of a batch.
        stock: of the same batch on stock vLLM.

    Returns:
        None for other models and GPUs than those whose numbers stand here.

    """
    name = record["hardware"].get("gpu", "")
    gpu = next((known for known in RATES if known in name), None)
    if gpu is None or record["specification"]["engine"]["model"] != MODEL:
        return None
    load = record["specification"]["load"]
    # Nominal where it is given: whole blocks are the method's own loss.
    budget = record["budget_tokens"]
    sparsity = record["sparsity"] if budget is None else record["effective_sparsity"]
    return seconds(load, stock["kv_cache_tokens"], 0.0, gpu) / seconds(
        load, record["kv_cache_tokens"], sparsity, gpu
    )
