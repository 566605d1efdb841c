"""Packing on the GPU: one launch ranks, one moves, for all layers and requests; where a ranking
looks at keys, one before reads them.

A ranking that the kernel does not know, a third party's say, is computed by torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..kernels import choose
from ..kernels.key_difference import key_difference
from ..kernels.pack import Caches, move_tokens, words
from ..policies import (
    TokenRule,
    by_key_difference,
    by_mass,
    by_peak,
    by_position,
    by_score,
)
from ..policies.token_rules import Ranking
from .packing import Packer
from .quantised_cache import Scales, dequantised, numbers
from .token_choice import Batch

_FUSED: tuple[tuple[Ranking, int], ...] = (
    (by_mass, choose.MASS),
    (by_peak, choose.PEAK),
    (by_position, choose.POSITION),
    (by_key_difference, choose.GIVEN),
)


class CUDAPacker(Packer):
    """``Packer`` over FlashAttention's caches; everything is enqueued, nothing is waited for.

    ``scales``: of each layer's cache, by its name; None where it is not quantised.
    """

    checks = False

    def __init__(self, *, scales: Mapping[str, Scales | None] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._scales = [[(scales or {}).get(n) for n in names] for names in kwargs["groups"]]
        # Each group's caches, as their keys are read and as their tokens are moved.
        self._numbers = [Caches.of([numbers(c) for c in caches]) for caches in self.caches]
        self._words = [Caches.of([words(c) for c in caches]) for caches in self.caches]

    def pack_fused(self, rule: TokenRule, batch: Batch, group: int) -> bool:
        rankings = self.rankings(rule)
        if not rankings:
            return False
        every = len(self.caches[group])
        # Ranks that one launch leaves for the next come on top of the lists of moves.
        given = choose.GIVEN in rankings
        for layers in self.slices(rule, batch, every) if given else [slice(0, every)]:
            moves = self.chosen(rankings, batch, group, layers)
            self.move(group, layers, batch.block_ids, *moves)
        return True

    def rankings(self, rule: TokenRule) -> tuple[int, ...]:
        """A rule's rankings as the kernel knows them; none if it does not know them all."""
        score = choose.MEAN if self.scoring == "mean" else choose.MASS
        kinds = (*_FUSED, (by_score, score))
        known = tuple(kind for ranking, _ in rule.ranked for of, kind in kinds if of is ranking)
        fused = rule.selection == "head" and len(known) == len(rule.ranked) <= 2
        return known if fused else ()

    def chosen(
        self, rankings: tuple[int, ...], batch: Batch, group: int, layers: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What moves where in some layers of a group (``token_choice.moves``)."""
        given = None
        if choose.GIVEN in rankings:
            given = key_difference(
                self._numbers[group],
                batch.block_ids,
                batch.numbers,
                layers=layers,
                most_candidates=batch.most_candidates,
            )
        return choose.choose_tokens(
            batch.block_ids,
            batch.numbers,
            {name: array[layers] for name, array in self.tokens.arrays().items()},
            rankings,
            sink_tokens=self.sink_tokens,
            most_candidates=batch.most_candidates,
            most_moves=batch.most_moves,
            given=given,
        )

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
            self._words[group],
            block_ids,
            source,
            target,
            count,
            self.tokens.arrays(),
            first_layer=layers.start,
        )
