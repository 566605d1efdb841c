"""Packing: every head's best tokens move into the request's first blocks, on any device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch

from ..packs import Pack
from ..policies import TokenRule, get_policy
from .token_choice import FALLBACK, Batch, TokenCandidates, choose, moves
from .token_scores import TokenScores

MOST_CANDIDATES = 1 << 22
"""Tokens, times heads and layers, that are ranked at once, unless a single layer has more. Ranking
takes some 70 bytes each, out of what the step's activations leave."""


class Packer(ABC):
    """Packs the requests of one engine.

    Args:
        kv_caches: by layer, ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``.
        groups: layer names of each layer group, in order of execution.
        tokens: the scores, which move along.
        scoring: ``sum``, ``mean`` or ``decay``.
        sink_tokens: so many first tokens of a sequence always stay.
        first_head, num_heads: KV heads of the whole model before this rank's, and in all.

    """

    checks = True
    """Whether rankings are looked through for NaN."""

    def __init__(
        self,
        kv_caches: Mapping[str, torch.Tensor],
        groups: Sequence[Sequence[str]],
        tokens: TokenScores,
        scoring: str,
        sink_tokens: int,
        first_head: int = 0,
        num_heads: int | None = None,
    ) -> None:
        self.caches = [[kv_caches[name] for name in names] for names in groups]
        self.tokens = tokens
        self.scoring, self.sink_tokens = scoring, sink_tokens
        layers, _, heads, self._block_size = tokens.position.shape
        self._device = tokens.position.device
        head = torch.arange(heads, device=self._device)[None, :, None] + first_head
        layer = torch.arange(layers, device=self._device)[:, None, None]
        self._streams = layer * (num_heads or heads) + head
        self._group_stride = layers * (num_heads or heads)

    @abstractmethod
    def vectors(
        self, group: int, layer: int, block_ids: torch.Tensor, heads: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of blocks (int64 ``[requests, blocks]``) in a layer of a group, as
        attention sees them; float32 ``[requests, heads, tokens, head_size]`` each."""

    def pack_fused(self, rule: TokenRule, batch: Batch, group: int) -> bool:
        """Pack in some faster way; False where there is none for this rule."""
        return False

    @abstractmethod
    def move(
        self,
        group: int,
        layers: slice,
        block_ids: torch.Tensor,
        source: torch.Tensor,
        target: torch.Tensor,
        count: torch.Tensor,
    ) -> None:
        """Move tokens and their scores (``token_choice.moves``), in some layers of a group."""

    def pack(self, packs: Mapping[str, Sequence[Pack]]) -> dict[str, str]:
        """Pack requests; of those whose policy could not be followed, why."""
        failures: dict[str, str] = {}
        for requests, together in self._batches(packs):
            if (failure := self._pack(together)) is None:
                continue
            if len(together) == 1:
                failures[requests[0]] = failure
                continue
            # Nothing was moved. One request's trouble is not its neighbours'.
            for request_id, pack in zip(requests, together, strict=True):
                if (failure := self._pack([pack])) is not None:
                    failures[request_id] = failure
        return failures

    def _batches(
        self, packs: Mapping[str, Sequence[Pack]]
    ) -> Iterator[tuple[list[str], list[Pack]]]:
        """Packs that follow one rule in one layer group, so many as are ranked at once."""
        alike: dict[tuple[int, str, str], list[tuple[str, Pack]]] = {}
        for request_id, planned in packs.items():
            for pack in planned:
                rule = repr(sorted(pack.policy_args.items()))
                alike.setdefault((pack.group, pack.policy, rule), []).append((request_id, pack))
        layers, _, heads, _ = self.tokens.position.shape
        for members in alike.values():
            # Of like length first: what is shorter than the longest is padded.
            members.sort(key=lambda member: len(member[1].block_ids))
            while members:
                size = 1
                for size, (_, pack) in enumerate(members, 1):
                    tokens = size * len(pack.block_ids) * self._block_size
                    if tokens * layers * heads > MOST_CANDIDATES:
                        size = max(1, size - 1)
                        break
                taken, members = members[:size], members[size:]
                yield [name for name, _ in taken], [pack for _, pack in taken]

    def _pack(self, packs: Sequence[Pack]) -> str | None:
        """Pack; why the policy could not be followed, or None.

        A single request is packed all the same, by ``FALLBACK``. Of several none is.
        """
        group, policy = packs[0].group, get_policy(packs[0].policy)
        assert policy.tokens is not None  # ``Policy.require`` saw to it
        rule, failure = policy.tokens(packs[0].policy_args), None
        batch = Batch.of(packs, rule, self._block_size, self.sink_tokens, self._device)
        if self.pack_fused(rule, batch, group):
            return None
        kept = []
        for layers in self.slices(rule, batch, len(self.caches[group])):
            candidates = TokenCandidates(
                self.tokens.gather(batch.block_ids, layers),
                self.scoring,
                batch.num_tokens,
                batch.first_query,
                batch.seeds,
                self._streams[layers] + group * self._group_stride,
                batch.num_candidates,
                partial(self._vectors, group, layers.start, batch.block_ids),
            )
            try:
                chosen = choose(rule, candidates, batch, self.sink_tokens, self.checks)
            except Exception as error:
                # A third party's ranking must not take the engine down.
                failure = f"{type(error).__name__}: {error}"
                if len(packs) > 1:
                    return failure
                one = batch.of_one_ranking()
                chosen = choose(FALLBACK, candidates, one, self.sink_tokens, self.checks)
            kept.append((layers, chosen))
        # Only now: whoever failed above has moved nothing.
        for layers, chosen in kept:
            source, target, count = moves(chosen, batch.num_kept, batch.most_moves)
            self.move(group, layers, batch.block_ids, source, target, count)
        return failure

    def _vectors(
        self, group: int, first_layer: int, block_ids: torch.Tensor, layer: int, heads: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.vectors(group, first_layer + layer, block_ids, heads)

    def slices(self, rule: TokenRule, batch: Batch, layers: int) -> Iterator[slice]:
        """Layers that are ranked together: all, unless they are too many tokens."""
        heads = self.tokens.position.shape[2]
        per_layer = batch.block_ids.numel() * self._block_size * heads
        step = max(1, MOST_CANDIDATES // per_layer) if rule.selection != "group" else layers
        for start in range(0, layers, step):
            yield slice(start, min(start + step, layers))
