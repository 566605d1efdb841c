"""How vLLM's CPU kernels lay out a block of keys and values, and how to read and move tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm import _custom_ops as ops

from ..parsing import EvictionConfigError

KEYS, VALUES = 0, 1


@dataclass(frozen=True)
class CacheLayout:
    """``orders``: for keys and for values, the place of element (token, dim) within a block's half
    of one head; int64 ``[block_size, head_size]`` each."""

    orders: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def of(cls, kv_cache: torch.Tensor, layer: Any, kv_cache_dtype: str) -> CacheLayout:
        """That of ``kv_cache``, float ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``.

        The kernels transpose and pack by instruction set (``layer.isa``). Rather than repeat each
        layout, write keys and values that spell their own index through vLLM's kernel into a
        one-block cache, and read where they landed. Digits of base 128 are exact in every KV data
        type.

        Raises:
            EvictionConfigError: what was written cannot be read back.

        """
        _, num_kv_heads, block_size, width = kv_cache.shape
        head_size = width // 2
        size = block_size * head_size
        index = torch.arange(size)
        landed = torch.zeros(2, size, dtype=torch.int64)
        slots = torch.arange(block_size)
        for digit in range(3):
            numbers = (index // 128**digit % 128).to(kv_cache.dtype)
            spelt = numbers.view(block_size, 1, head_size).expand(-1, num_kv_heads, -1).contiguous()
            scratch = torch.zeros(1, num_kv_heads, block_size * 2, head_size, dtype=kv_cache.dtype)
            halves = scratch.chunk(2, dim=2)
            ops.cpu_attn_reshape_and_cache(
                spelt,
                spelt,
                *halves,
                slots,
                layer.isa,
                k_scale=layer._k_scale_float,
                v_scale=layer._v_scale_float,
                kv_cache_dtype=kv_cache_dtype,
            )
            for which, half in enumerate(halves):
                landed[which] += half[0, 0].reshape(-1).float().round().long() * 128**digit
        orders = torch.empty_like(landed)
        for which in (KEYS, VALUES):
            orders[which, landed[which]] = index
            if not torch.equal(landed[which, orders[which]], index):
                raise EvictionConfigError(
                    f"a cache of head size {head_size} is stored in a form that cannot be read "
                    f"back (instruction set {layer.isa!r}); use another dtype or block size"
                )
        return cls(tuple(orders.view(2, block_size, head_size)))

    def read(self, kv_cache: torch.Tensor, block_ids: torch.Tensor, which: int) -> torch.Tensor:
        """``KEYS`` or ``VALUES`` of blocks in plain order, ``[num_kv_heads, n * block_size,
        head_size]``."""
        order = self.orders[which]
        half = _half(kv_cache, which)
        plain = half.index_select(0, block_ids).index_select(2, order.reshape(-1))
        plain = plain.view(len(block_ids), kv_cache.shape[1], *order.shape)
        return plain.transpose(0, 1).flatten(1, 2)

    def move(
        self,
        kv_cache: torch.Tensor,
        heads: torch.Tensor,
        source: tuple[torch.Tensor, torch.Tensor],
        target: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Copy tokens, each of one head, to other slots. No slot is a source and a target.

        Args:
            kv_cache: as in ``of``.
            heads: int64 ``[n]``.
            source, target: block ids and places within them, int64 ``[n]`` each.

        """
        for which, order in enumerate(self.orders):
            half = _half(kv_cache, which)
            (block, slot), (to_block, to_slot) = source, target
            moved = half[block[:, None], heads[:, None], order[slot]]
            half[to_block[:, None], heads[:, None], order[to_slot]] = moved


def _half(kv_cache: torch.Tensor, which: int) -> torch.Tensor:
    """Keys or values, ``[num_blocks, num_kv_heads, block_size * head_size]``, a view."""
    num_blocks, num_kv_heads = kv_cache.shape[:2]
    return kv_cache.view(num_blocks, num_kv_heads, 2, -1)[:, :, which]
