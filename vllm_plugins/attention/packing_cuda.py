"""Packing on the GPU: one launch ranks, one moves, for all layers and requests.

A ranking that the kernel does not know, a third party's say, is computed by torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..kernels import choose
from ..kernels.pack import cache_offsets, move_tokens, words
from ..policies import TokenRule, by_mass, by_peak, by_position, by_score
from ..policies.token_rules import Ranking
from .packing import Packer
from .quantised_cache import Scales, dequantised, numbers
from .token_choice import Batch

_FUSED: tuple[tuple[Ranking, int], ...] = (
    (by_mass, choose.MASS),
    (by_peak, choose.PEAK),
    (by_position, choose.POSITION),
)


class CUDAPacker(Packer):
    """``Packer`` over FlashAttention's caches; everything is enqueued, nothing is waited for.

    ``scales``: of each layer's cache, by its name; None where it is not quantised.
    """

    checks = False

    def __init__(self, *, scales: Mapping[str, Scales | None] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._scales = [[(scales or {}).get(n) for n in names] for names in kwargs["groups"]]
        self._words = [[words(cache) for cache in caches] for caches in self.caches]
        self._offsets = [cache_offsets(caches) for caches in self._words]

    def pack_fused(self, rule: TokenRule, batch: Batch, group: int) -> bool:
        score = choose.MEAN if self.scoring == "mean" else choose.MASS
        kinds = (*_FUSED, (by_score, score))
        rankings = tuple(
            kind for ranking, _ in rule.ranked for known, kind in kinds if known is ranking
        )
        if rule.selection != "head" or len(rankings) < len(rule.ranked) or len(rankings) > 2:
            return False
        moves = choose.choose_tokens(
            batch.block_ids,
            batch.numbers,
            self.tokens.arrays(len(self.caches[group])),
            rankings,
            sink_tokens=self.sink_tokens,
            most_candidates=batch.most_candidates,
            most_moves=batch.most_moves,
        )
        self.move(group, slice(0, len(self.caches[group])), batch.block_ids, *moves)
        return True

    def vectors(
        self, group: int, layer: int, block_ids: torch.Tensor, heads: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scales = self._scales[group][layer]
        # Gathered as bytes, where they are bytes: torch indexes few types of 8-bit floats.
        gathered = self.caches[group][layer][:, heads][block_ids]
        # requests, blocks, heads, tokens, 2 * head_size
        keys, values = numbers(gathered.transpose(1, 2).flatten(2, 3)).chunk(2, dim=-1)
        of_keys, of_values = (scales.key, scales.value) if scales else (None, None)
        return dequantised(keys, of_keys, heads), dequantised(values, of_values, heads)

    def move(
        self,
        group: int,
        layers: slice,
        block_ids: torch.Tensor,
        source: torch.Tensor,
        target: torch.Tensor,
        count: torch.Tensor,
    ) -> None:
        move_tokens(
            self._words[group][0],
            self._offsets[group],
            block_ids,
            source,
            target,
            count,
            self.tokens.arrays(),
            first_layer=layers.start,
        )
