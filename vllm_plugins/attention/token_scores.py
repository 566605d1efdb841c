"""Scores of single tokens, per layer, KV head and slot. A packed token takes its scores along."""

from __future__ import annotations

import torch

from ..policies import TOKEN_MASS, TOKEN_PEAK

UNWRITTEN = -1


class TokenScores:
    """Arrays ``[layers, num_blocks, kv_heads, block_size]``, layers being those of a layer group,
    the largest one.

    A physical block belongs to one layer group at a time, so the groups share the arrays, as they
    share the memory of the blocks.

    Attributes:
        position: int32, a token's place in its sequence; the queries that saw it follow from it.
        mass: float32, attention received from the queries of the KV head; empty if nobody asks.
        peak: float32, the largest probability ever given; empty if nobody asks.

    """

    def __init__(
        self,
        num_layers: int,
        cache_shape: tuple[int, int, int],
        needs: frozenset[str],
        device: torch.device,
    ) -> None:
        """``cache_shape``: blocks, KV heads, tokens per block."""
        shape = (num_layers, *cache_shape)
        none = (num_layers, 0, *cache_shape[1:])
        self.position = torch.full(shape, UNWRITTEN, dtype=torch.int32, device=device)
        self.mass = torch.zeros(shape if TOKEN_MASS in needs else none, device=device)
        self.peak = torch.zeros(shape if TOKEN_PEAK in needs else none, device=device)

    def arrays(self) -> dict[str, torch.Tensor]:
        """Those that are kept, by name."""
        named = {"position": self.position, "mass": self.mass, "peak": self.peak}
        return {name: array for name, array in named.items() if array.numel()}

    def gather(self, block_ids: torch.Tensor, layers: slice) -> dict[str, torch.Tensor]:
        """What lies in blocks, int64 ``[requests, blocks]``: of each array
        ``[requests, layers, kv_heads, blocks * block_size]``, blocks in order."""
        gathered = {}
        for name, array in self.arrays().items():
            chosen = array[layers][:, block_ids]  # layers, requests, blocks, heads, tokens
            gathered[name] = chosen.permute(1, 0, 3, 2, 4).flatten(3)
        return gathered


def bytes_per_token(needs: frozenset[str]) -> int:
    """Of scores for a token, KV head and layer; 0 if no request may choose by tokens."""
    return 4 + 4 * (TOKEN_MASS in needs) + 4 * (TOKEN_PEAK in needs) if needs else 0
