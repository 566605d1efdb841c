"""What eviction can buy at best on a workload: prefill is arithmetic, decode moves bytes.

    time = prefill FLOPs / rate + sum over decode steps of (weights + live KV bytes) / bandwidth

Memory for keys and values limits how many requests decode together: ``C = pool / peak per
request``. ``N / C`` waves of ``output_tokens`` steps each; a step reads the weights once and every
live token's keys and values. Evicting shrinks the live tokens, so more requests share each read
of the weights *and* each read is smaller. The bound is a ratio to the dense time by the same
formula; what vLLM loses to launch gaps or sampling hits both sides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

RATES = {
    # Measured: 8192^3 bf16 product and a device-to-device copy (bytes read + written).
    "H200": (790e12, 4.3e12),
    "H100": (790e12, 3.0e12),
}
PARAMETERS = 8.03e9
BYTES_PER_TOKEN = 32 * 2 * 8 * 128 * 2


@dataclass(frozen=True)
class Workload:
    """``num_requests`` prompts of ``prompt_tokens``, ``output_tokens`` each, all at once."""

    num_requests: int
    prompt_tokens: int
    output_tokens: int


def seconds(workload: Workload, pool_bytes: float, sparsity: float, gpu: str) -> float:
    """Time of the workload at the roofline, with ``sparsity`` of the blocks evicted."""
    flops, bandwidth = RATES[gpu]
    prompt, output = workload.prompt_tokens, workload.output_tokens
    attention = 4 * 32 * 32 * 128 * prompt * prompt / 2
    prefill = workload.num_requests * (2 * PARAMETERS * prompt + attention) / flops
    live_end = (1 - sparsity) * (prompt + output)
    live_mean = (1 - sparsity) * (prompt + output / 2)
    together = min(workload.num_requests, math.floor(pool_bytes / (live_end * BYTES_PER_TOKEN)))
    steps = workload.num_requests / together * output
    weights = 2 * PARAMETERS
    step = (weights + together * live_mean * BYTES_PER_TOKEN) / bandwidth
    return prefill + steps * step


def _sparsity(side: str) -> float:
    """``h2o_0.9_sampled`` -> 0.9; stock has none."""
    parts = side.split("_")
    return 0.0 if parts[0] == "stock" else float(parts[1])


def roofline(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By load and side, the largest ratio to stock that the record's GPU allows."""
    gpu = next((name for name in RATES if name in record["hardware"].get("gpu", "")), None)
    if gpu is None:
        return {}
    pools = {
        entry["side"]: entry["kv_cache_tokens"] * BYTES_PER_TOKEN for entry in record["measured"]
    }
    bounds: dict[str, dict[str, float]] = {}
    for entry in record["measured"]:
        workload = Workload(**record["loads"][entry["load"]]["workload"])
        side = entry["side"]
        stock = seconds(workload, pools.get("stock", pools[side]), 0.0, gpu)
        bound = stock / seconds(workload, pools[side], _sparsity(side), gpu)
        bounds.setdefault(entry["load"], {})[side] = bound
    return bounds
