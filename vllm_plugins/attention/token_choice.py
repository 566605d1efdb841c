"""Which tokens a head keeps: a policy's rule applied to all layers and heads at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch.nn.functional import avg_pool1d, normalize
from vllm.utils.torch_utils import async_tensor_h2d

from ..packs import Pack
from ..policies import TokenRule, by_position, chance

FALLBACK = TokenRule(recent=0.0, ranked=((by_position, 1.0),))
"""Where a policy's ranking fails, the most recent tokens stay: some have to, as the scheduler has
freed the other blocks already."""
MOST_VECTORS = 1 << 17
"""Keys and values that are looked at together, unless one head has more: with copies some 256 MiB
at a head size of 128."""
Vectors = Callable[[int, slice], tuple[torch.Tensor, torch.Tensor]]
_LEAST = torch.iinfo(torch.int64).min


@dataclass
class TokenCandidates:
    """``policies.Candidates`` over torch arrays ``[requests, layers, heads, tokens]``.

    Attributes:
        arrays: ``position`` and what else was gathered (``TokenScores.gather``).
        scoring: ``sum``, ``mean`` or ``decay``.
        num_tokens, seeds: int64 ``[requests, 1, 1, 1]``, processed tokens and seed of each request.
        first_query: the like, tokens whose queries nobody scored (``Pack.first_query``).
        streams: int64 ``[layers, heads, 1]``, a number for each head of the whole model.
        num_candidates: int64 ``[requests, 1, 1, 1]``; what lies behind them is padding.
        vectors: layer (of the arrays' first to last) and heads to keys and values, float32
            ``[requests, heads, tokens, head_size]`` each.

    """

    arrays: Mapping[str, torch.Tensor]
    scoring: str
    num_tokens: torch.Tensor
    first_query: torch.Tensor
    seeds: torch.Tensor
    streams: torch.Tensor
    num_candidates: torch.Tensor
    vectors: Vectors

    @cached_property
    def real(self) -> torch.Tensor:
        """bool ``[requests, 1, 1, tokens]``: which slots hold candidates."""
        places = torch.arange(self.positions.shape[-1], device=self.positions.device)
        return places < self.num_candidates

    @property
    def positions(self) -> torch.Tensor:
        return self.arrays["position"]

    @property
    def mass(self) -> torch.Tensor:
        return self.arrays["mass"]

    @property
    def peak(self) -> torch.Tensor:
        return self.arrays["peak"]

    @property
    def score(self) -> torch.Tensor:
        if self.scoring != "mean":
            return self.mass
        # Every query from the token's own on saw it, and nobody else did.
        first = self.positions.maximum(self.first_query)
        return self.mass / (self.num_tokens - first).clamp(min=1)

    @property
    def chance(self) -> torch.Tensor:
        return chance(self.positions.long(), self.seeds, self.streams)

    @cached_property
    def key_norm(self) -> torch.Tensor:
        return self._of_vectors(lambda k, v: v.norm(dim=-1) / k.norm(dim=-1).clamp(min=1e-6))

    @cached_property
    def value_norm(self) -> torch.Tensor:
        return self._of_vectors(lambda _, v: v.norm(p=1, dim=-1))

    @cached_property
    def key_difference(self) -> torch.Tensor:
        real = self.real[:, 0, :, :, None]

        def difference(keys: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            # Selected, not multiplied: what lies behind the candidates may be anything.
            unit = torch.where(real, normalize(keys, dim=-1), 0.0)
            mean = unit.sum(-2, keepdim=True) / real.sum(-2, keepdim=True)
            return -(unit * normalize(mean, dim=-1)).sum(-1)

        return self._of_vectors(difference)

    def pooled(self, values: torch.Tensor, width: int) -> torch.Tensor:
        # What is padding sorts behind all that is real, and counts for nothing.
        far = torch.iinfo(torch.int32).max
        order = torch.where(self.real, self.positions, far).argsort(-1)
        real = self.real.expand_as(values).gather(-1, order)
        ordered = torch.where(real, values.gather(-1, order), 0.0)
        flat = torch.stack((ordered, real.float())).flatten(0, -2)[:, None]
        sums = avg_pool1d(flat, width, 1, width // 2) * width
        total, count = sums[:, 0].view(2, *values.shape)
        return torch.empty_like(values).scatter_(-1, order, total / count.clamp(min=1.0))

    def _of_vectors(
        self, number: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """A number of each token's key and value, an array like the others."""
        requests, layers, heads, tokens = self.positions.shape
        together = max(1, MOST_VECTORS // (requests * tokens))
        made = torch.empty(self.positions.shape, device=self.positions.device)
        for layer in range(layers):
            for start in range(0, heads, together):
                part = slice(start, min(start + together, heads))
                made[:, layer, part] = number(*self.vectors(layer, part))
        return made


@dataclass(frozen=True)
class Batch:
    """Packs of one rule, as tensors.

    Attributes:
        block_ids: int64 ``[requests, blocks]``; behind a request's last one, any.
        numbers: int64 ``[requests, 5 + rankings]``, of which the other tensors are made where torch
            ranks; the kernels read these themselves.
        most_candidates, most_moves: of a head, tokens.
        one_ranking: it takes all that stay, whatever the rule's take.

    """

    block_ids: torch.Tensor
    numbers: torch.Tensor
    most_candidates: int
    most_moves: int
    one_ranking: bool = False

    @cached_property
    def _columns(self) -> tuple[torch.Tensor, ...]:
        return self.numbers[:, :, None, None, None].unbind(1)

    @property
    def num_candidates(self) -> torch.Tensor:
        """Tokens of a head, int64 ``[requests, 1, 1, 1]`` as the others."""
        return self._columns[0]

    @property
    def num_kept(self) -> torch.Tensor:
        """Of them, those that stay."""
        return self._columns[1]

    @property
    def num_tokens(self) -> torch.Tensor:
        """``Pack.num_tokens``."""
        return self._columns[2]

    @property
    def first_query(self) -> torch.Tensor:
        """``Pack.first_query``."""
        return self._columns[3]

    @property
    def seeds(self) -> torch.Tensor:
        """``Pack.seed``."""
        return self._columns[4]

    @cached_property
    def counts(self) -> torch.Tensor:
        """Tokens that each ranking takes, int64 ``[rankings, requests, 1, 1, 1]``."""
        return self.num_kept[None] if self.one_ranking else torch.stack(self._columns[5:])

    @classmethod
    def of(
        cls,
        packs: Sequence[Pack],
        rule: TokenRule,
        block_size: int,
        sink_tokens: int,
        device: torch.device,
    ) -> Batch:
        """``packs``, which follow ``rule``, in one copy to the device."""
        width = max(len(pack.block_ids) for pack in packs)
        width += width % 2  # keeps the numbers behind it aligned: Triton compiles for that
        shares = [share for _, share in rule.ranked]
        rows = []
        for pack in packs:
            room = pack.num_kept_blocks * block_size
            counts = _counts(shares, room, pack.budget_blocks * block_size, sink_tokens)
            padding = [0] * (width - len(pack.block_ids))
            tokens = len(pack.block_ids) * block_size
            numbers = [tokens, room, pack.num_tokens, pack.first_query, pack.seed, *counts]
            rows.append([*pack.block_ids, *padding, *numbers])
        table = async_tensor_h2d(rows, device, torch.int64)
        return cls(
            table[:, :width],
            table[:, width:],
            max(len(p.block_ids) for p in packs) * block_size,
            max(len(p.block_ids) - p.num_kept_blocks for p in packs) * block_size,
        )

    def of_one_ranking(self) -> Batch:
        """The same for a rule with a single ranking, which takes all that stay."""
        return replace(self, one_ranking=True)


def choose(
    rule: TokenRule,
    candidates: TokenCandidates,
    batch: Batch,
    sink_tokens: int,
    check: bool = True,
) -> torch.Tensor:
    """The tokens that stay: bool, as the candidates' arrays, as many for every head of a request as
    its region has slots.

    Equal ranks go to the later token, as at block granularity (``policies.select.top``), so what is
    chosen never depends on where a token lies.

    Args:
        rule: the policy's.
        candidates: tokens to choose from.
        batch: how many stay.
        sink_tokens: so many first tokens of the sequence always stay.
        check: look for NaN; on a GPU that would wait for it, and NaN ranks last there.

    Raises:
        ValueError: a ranking gave NaN or the wrong shape.

    """
    positions = candidates.positions
    real = candidates.real
    left = real.expand_as(positions)
    for i, (ranking, _) in enumerate(rule.ranked):
        ranks = torch.as_tensor(ranking(candidates, left)).float()
        if ranks.shape != positions.shape:
            raise ValueError(f"a ranking gave {tuple(ranks.shape)} for {tuple(positions.shape)}")
        if check and bool((ranks.isnan() & left).any()):
            raise ValueError("a ranking holds NaN")
        ranks = _shared(ranks, rule.selection).nan_to_num(nan=float("-inf"))
        if i == 0:
            ranks = ranks.masked_fill(positions < sink_tokens, float("inf"))
        keys = _ordered(ranks, positions).masked_fill(~left, _LEAST)
        ranked = keys.sort(dim=-1, descending=True).values
        count = batch.counts[i]
        last = (count - 1).clamp(min=0).expand(*positions.shape[:-1], 1)
        left = left & ((keys < ranked.gather(-1, last)) | (count == 0))
    return real & ~left


def moves(
    kept: torch.Tensor, num_kept: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What stays behind the region moves into the region's holes, in order of place.

        | region ........ | ............... |      kept 1, hole 0
          1 0 1 1 0 1        0 1 0 0 1 0           the 7th slot's token goes to the 1st's, ...

    There are as many movers as holes, head by head, and nothing overlaps.

    Args:
        kept: bool ``[..., tokens]``.
        num_kept: int64 that broadcasts with it, slots of the region.
        most: no head moves more.

    Returns:
        source and target, int32 ``[..., most]``, and their number, int32 ``[...]``.

    """
    place = torch.arange(kept.shape[-1], device=kept.device)
    inside = place < num_kept
    listed = []
    for chosen in (kept & ~inside, ~kept & inside):
        rank = chosen.cumsum(-1, dtype=torch.int32) - 1
        rank = torch.where(chosen, rank, most).long()
        places = torch.zeros(*kept.shape[:-1], most + 1, dtype=torch.int32, device=kept.device)
        places.scatter_(-1, rank, place.int().expand_as(kept))
        listed.append(places[..., :most])
    return listed[0], listed[1], (kept & ~inside).sum(-1, dtype=torch.int32)


def _counts(shares: list[float], room: int, budget: int, sink_tokens: int) -> list[int]:
    """Tokens of each ranking: its share of the budget; the first one's is what is left."""
    later = []
    available = room - min(sink_tokens, room)
    for share in shares[1:]:
        later.append(min(round(budget * share), available))
        available -= later[-1]
    return [room - sum(later), *later]


def _shared(ranks: torch.Tensor, selection: str) -> torch.Tensor:
    """Ranks of tokens for those who keep one set together."""
    if selection == "head":
        return ranks
    over = (-2,) if selection == "layer" else (-3, -2)
    return ranks.sum(over, keepdim=True).expand_as(ranks)


def _ordered(ranks: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """int64 that sort like (rank, position). No two tokens of a head have the same."""
    bits = ranks.contiguous().view(torch.int32).long()
    bits = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)  # IEEE 754: sign and magnitude
    return (bits << 32) + positions
