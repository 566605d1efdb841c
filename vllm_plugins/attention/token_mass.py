"""How much attention each token received from each KV head's queries, in plain torch."""

from __future__ import annotations

import torch

from .block_mass import probabilities


def token_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    places: torch.Tensor,
    weights: torch.Tensor,
    scale: float,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention probability per KV head and key: its sum over queries, and its maximum.

    Args:
        query, key, places, weights, scale, soft_cap, sinks: as ``block_mass``. The maximum knows
            no weights.

    Returns:
        mass and peak, float32 ``[num_kv_heads, keys]`` each; the query heads of a group are summed
        in the one, and all compete in the other.

    """
    num_kv_heads, num_keys = key.shape[:2]
    mass = torch.zeros(num_kv_heads, num_keys)
    peak = torch.zeros(num_kv_heads, num_keys)
    for start, stop, seen in probabilities(query, key, places, scale, soft_cap, sinks):
        rows = seen.flatten(1, 2)
        num_seen = rows.shape[-1]
        counts = weights[start:stop].repeat(seen.shape[1])
        mass[:, :num_seen] += counts @ rows
        peak[:, :num_seen] = torch.maximum(peak[:, :num_seen], rows.amax(1))
    return mass, peak
