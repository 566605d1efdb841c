"""Packing on the CPU, in the layout of its attention kernels."""

from __future__ import annotations

from typing import Any

import torch

from .cache_layout_cpu import KEYS, VALUES, CacheLayout
from .packing import Packer


class CPUPacker(Packer):
    """``Packer`` over vLLM's CPU caches. ``layout``: of every layer's cache."""

    def __init__(self, layout: CacheLayout, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._layout = layout

    def vectors(
        self, group: int, layer: int, block_ids: torch.Tensor, heads: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        part = self.caches[group][layer][:, heads]
        keys, values = (
            self._layout.read(part, block_ids.flatten(), which)
            .float()
            .unflatten(1, (len(block_ids), -1))
            .transpose(0, 1)
            for which in (KEYS, VALUES)
        )
        return keys, values

    def move(
        self,
        group: int,
        layers: slice,
        block_ids: torch.Tensor,
        source: torch.Tensor,
        target: torch.Tensor,
        count: torch.Tensor,
    ) -> None:
        block_size = self.tokens.position.shape[-1]
        real = torch.arange(source.shape[-1]) < count[..., None]
        for place, cache in enumerate(self.caches[group][layers]):
            request, head, move = real[:, place].nonzero(as_tuple=True)
            places = []
            for listed in (source, target):
                at = listed[request, place, head, move].long()
                places.append((block_ids[request, at // block_size], at % block_size))
            self._layout.move(cache, head, *places)
            (block, slot), (to_block, to_slot) = places
            layer = layers.start + place
            for array in self.tokens.arrays().values():
                array[layer, to_block, head, to_slot] = array[layer, block, head, slot]
