"""What eviction can buy at best on a batch: prefill is arithmetic, decode moves bytes. Pure.

    time = prefill FLOPs / rate + sum over decode steps of (weights + live KV bytes) / bandwidth

Memory for keys and values limits how many requests decode together: ``C = pool / peak per
request``. ``N / C`` waves of ``output_tokens`` steps each; a step reads the weights once and every
live token's keys and values. Evicting shrinks the live tokens, so more requests share each read
of the weights *and* each read is smaller. The bound is a ratio to the dense time by the same
formula; what vLLM loses to launch gaps or sampling hits both sides.

In a steady state (``step_seconds``) a step of ``B`` sequences is

    max(weights / bandwidth, B * FLOPs per token / rate) + B * live KV bytes / bandwidth

The matrix products run one after the other with attention, so their times add up. Within each the
larger of bytes and FLOPs counts. For products that is the weights' bytes below some 260 rows and
FLOPs above; for attention of a single query it is always bytes. ``B`` is the load's number of
sequences, or as many as the pool holds at their mean live size (``renewal.mean_live_tokens``). The
input embedding is looked up: it is no part of the products. New prompts are left out: they add
``P / mean output`` rows per sequence, on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..records.specifications import STEADY
from .renewal import mean_live_tokens

MODEL = "llama-3.1-8b"
"""The model whose sizes stand here."""
RATES = {
    # Measured: 8192^3 bf16 product and a device-to-device copy (bytes read + written).
    "H200": (790e12, 4.3e12),
    "H100": (790e12, 3.0e12),
}
PARAMETERS = 8.03e9
IN_PRODUCTS = PARAMETERS - 128256 * 4096
"""All but the input embedding."""
NUMBERS_PER_TOKEN = 32 * 2 * 8 * 128
"""Of keys and values."""
BYTES_PER_NUMBER = {"fp8": 1, "fp8_e4m3": 1}
"""By ``kv_cache_dtype``; others are of 2. Attention in 8 bits has twice the FLOPs, too."""


def seconds(
    load: Mapping[str, Any],
    pool_tokens: float,
    sparsity: float,
    gpu: str,
    kv_cache_dtype: str = "auto",
) -> float:
    """Time of a batch at the roofline.

    Args:
        load: ``num_requests``, ``prompt_tokens`` and ``output_tokens`` of each.
        pool_tokens: tokens that the KV pool holds.
        sparsity: share of the blocks that is evicted.
        gpu: of ``RATES``.
        kv_cache_dtype: of the engine.

    """
    flops, bandwidth = RATES[gpu]
    number = BYTES_PER_NUMBER.get(kv_cache_dtype, 2)
    num_requests = load["num_requests"]
    prompt, output = load["prompt_tokens"], load["output_tokens"]
    attention = 4 * 32 * 32 * 128 * prompt * prompt / 2 * number / 2
    prefill = num_requests * (2 * PARAMETERS * prompt + attention) / flops
    live_end = (1 - sparsity) * (prompt + output)
    live_mean = (1 - sparsity) * (prompt + output / 2)
    together = max(1, min(num_requests, math.floor(pool_tokens / live_end)))
    steps = num_requests / together * output
    weights = 2 * PARAMETERS
    step = (weights + together * live_mean * number * NUMBERS_PER_TOKEN) / bandwidth
    return prefill + steps * step


def steady_rows(
    load: Mapping[str, Any], pool_tokens: float, sparsity: float, budget_tokens: int | None = None
) -> tuple[float, float]:
    """Sequences that a step of a steady load has, and live tokens of each, on average.

    Args:
        load: ``num_sequences``, ``prompt_tokens``, and ``output_tokens``, shortest and longest.
        pool_tokens: tokens that the KV pool holds.
        sparsity: share of the tokens that is evicted.
        budget_tokens: in place of ``sparsity``.

    """
    shortest, longest = load["output_tokens"]
    prompt = load["prompt_tokens"]
    live = mean_live_tokens(prompt, (shortest, longest), sparsity, budget_tokens)
    return min(load["num_sequences"], pool_tokens / live), live


def step_seconds(rows: float, live_tokens: float, gpu: str, kv_cache_dtype: str = "auto") -> float:
    """Time of a decode step at the roofline.

    Args:
        rows: sequences that get a token.
        live_tokens: of each.
        gpu: of ``RATES``.
        kv_cache_dtype: of the engine.

    """
    flops, bandwidth = RATES[gpu]
    per_token = NUMBERS_PER_TOKEN * BYTES_PER_NUMBER.get(kv_cache_dtype, 2)
    products = max(2 * IN_PRODUCTS / bandwidth, 2 * IN_PRODUCTS * rows / flops)
    return products + rows * live_tokens * per_token / bandwidth


def largest_ratio(record: Mapping[str, Any], stock: Mapping[str, Any]) -> float | None:
    """The largest ratio to stock vLLM that the GPU of a bench record allows.

    Args:
        record: of a batch, or of a steady load.
        stock: of stock vLLM on the study's load.

    Returns:
        None for other models and GPUs than those whose numbers stand here, and for loads with
        shared tokens or turns: the formula computes every token of every prompt.

    """
    gpu = _gpu_of(record)
    if gpu is None or _shares(record) or _shares(stock):
        return None
    if record["kind"] == STEADY:
        (rows, step), (base_rows, base_step) = _steady_step(record, gpu), _steady_step(stock, gpu)
        return (rows / step) / (base_rows / base_step)
    load = record["specification"]["load"]
    # Nominal where it is given: whole blocks are the method's own loss.
    budget = record["budget_tokens"]
    sparsity = record["sparsity"] if budget is None else record["effective_sparsity"]
    base_load = stock["specification"]["load"]
    base = seconds(base_load, stock["kv_cache_tokens"], 0.0, gpu, _kv_cache_dtype(stock))
    ratio = base / seconds(load, record["kv_cache_tokens"], sparsity, gpu, _kv_cache_dtype(record))
    return ratio * _output_tokens(load) / _output_tokens(base_load)


def least_ms_per_step(record: Mapping[str, Any]) -> float | None:
    """The shortest step that the GPU of a steady load's record allows; None as above."""
    gpu = _gpu_of(record)
    return None if gpu is None else 1e3 * _steady_step(record, gpu)[1]


def _steady_step(record: Mapping[str, Any], gpu: str) -> tuple[float, float]:
    """Sequences of a step, and its seconds."""
    load, pool = record["specification"]["load"], record["kv_cache_tokens"]
    rows, live = steady_rows(load, pool, record["sparsity"], record["budget_tokens"])
    return rows, step_seconds(rows, live, gpu, _kv_cache_dtype(record))


def _kv_cache_dtype(record: Mapping[str, Any]) -> str:
    return record["specification"]["engine"].get("arguments", {}).get("kv_cache_dtype", "auto")


def _shares(record: Mapping[str, Any]) -> bool:
    load = record["specification"]["load"]
    more = max(load.get("turns", 1), load.get("beam_width", 1))
    return load.get("shared_tokens", 0) > 0 or more > 1


def _output_tokens(load: Mapping[str, Any]) -> int:
    return load["num_requests"] * load["output_tokens"]


def _gpu_of(record: Mapping[str, Any]) -> str | None:
    """The GPU of a record by its name in ``RATES``; None if its sizes do not stand here."""
    if record["specification"]["engine"]["model"] != MODEL:
        return None
    name = record["hardware"].get("gpu", "")
    return next((known for known in RATES if known in name), None)
