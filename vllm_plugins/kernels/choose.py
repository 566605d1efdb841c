"""Which tokens every head keeps, for the usual rankings: the first half of packing, in one launch.

``attention/token_choice.py`` says the same in torch, for any ranking; from the same ranks the two
choose the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

MASS, MEAN, PEAK, POSITION, GIVEN = range(5)
"""Rankings: attention received; per query that saw the token; the highest ever; the most recent;
what the caller has worked out."""
_MASS, _MEAN, _PEAK, _GIVEN = (tl.constexpr(kind) for kind in (MASS, MEAN, PEAK, GIVEN))
_LEAST = tl.constexpr(-(2**31))
_SMALL_TILE, _LARGE_TILE = 512, 2048
WARM_UP_TOKENS = (_SMALL_TILE, _LARGE_TILE, 2 * _LARGE_TILE)
"""So many candidates each bring out another compiled form."""


@triton.jit
def _ordered(rank):
    """int32 that sort like float32. NaN comes last."""
    bits = tl.where(rank == rank, rank, float("-inf")).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@triton.jit
def _rank(
    kind: tl.constexpr,
    position,
    now,
    first_query,
    mass_ptr,
    peak_ptr,
    given_ptr,
    at,
    place,
    real,
):
    if kind == _MASS:
        rank = tl.load(mass_ptr + at, mask=real, other=0.0)
    elif kind == _MEAN:
        mass = tl.load(mass_ptr + at, mask=real, other=0.0)
        queries = tl.maximum(now - tl.maximum(position, first_query), 1)
        rank = tl.div_rn(mass, queries.to(tl.float32))
    elif kind == _PEAK:
        rank = tl.load(peak_ptr + at, mask=real, other=0.0)
    elif kind == _GIVEN:
        rank = tl.load(given_ptr + place, mask=real, other=0.0)
    else:
        rank = position.to(tl.float32)
    return rank


@triton.jit
def _tile(
    start,
    num_candidates,
    now,
    first_query,
    sink_tokens,
    ids_ptr,
    position_ptr,
    mass_ptr,
    peak_ptr,
    given_ptr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Positions and sort keys of a tile of candidates; those that are none have the least keys."""
    place = start + tl.arange(0, TILE)
    real = place < num_candidates
    block = tl.load(ids_ptr + place // BLOCK_SIZE, mask=real, other=0)
    at = block * (HEADS * BLOCK_SIZE) + place % BLOCK_SIZE
    position = tl.load(position_ptr + at, mask=real, other=-1)
    rank = _rank(FIRST, position, now, first_query, mass_ptr, peak_ptr, given_ptr, at, place, real)
    first = _ordered(tl.where(position < sink_tokens, float("inf"), rank))
    second = first
    if SECOND >= 0:
        rank = _rank(
            SECOND, position, now, first_query, mass_ptr, peak_ptr, given_ptr, at, place, real
        )
        second = _ordered(rank)
    return place, real, position, first, second


# No integer is specialised: each would compile the kernel anew, in the middle of serving.
@triton.jit(
    do_not_specialize=[
        "ids_stride",
        "numbers_stride",
        "list_stride",
        "layer_stride",
        "given_stride",
        "sink_tokens",
    ]
)
def _choose_kernel(
    ids_ptr,
    numbers_ptr,
    position_ptr,
    mass_ptr,
    peak_ptr,
    given_ptr,
    source_ptr,
    target_ptr,
    count_ptr,
    ids_stride,
    numbers_stride,
    list_stride,
    layer_stride,
    given_stride,
    sink_tokens,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    request = tl.program_id(0)
    layer = tl.program_id(1) // HEADS
    head = tl.program_id(1) % HEADS
    item = request.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    ids_ptr += request * ids_stride
    numbers_ptr += request * numbers_stride
    num_candidates = tl.load(numbers_ptr).to(tl.int32)
    room = tl.load(numbers_ptr + 1).to(tl.int32)
    now = tl.load(numbers_ptr + 2).to(tl.int32)
    first_query = tl.load(numbers_ptr + 3).to(tl.int32)
    own = layer.to(tl.int64) * layer_stride + head * BLOCK_SIZE
    position_ptr += own
    mass_ptr += own
    peak_ptr += own
    given_ptr += item * given_stride
    least = tl.full([], _LEAST, tl.int64)

    if ONE_TILE:
        place, real, position, first, second = _tile(
            0,
            num_candidates,
            now,
            first_query,
            sink_tokens,
            ids_ptr,
            position_ptr,
            mass_ptr,
            peak_ptr,
            given_ptr,
            FIRST,
            SECOND,
            HEADS,
            BLOCK_SIZE,
            TILE,
        )
    # Of each ranking, its least key that is chosen, and of those with this key the least position.
    first_key = least
    first_position = tl.full([], 0, tl.int64)
    second_key = least
    second_position = tl.full([], 0, tl.int64)
    first_count = tl.load(numbers_ptr + 5)
    second_count = tl.full([], 0, tl.int64)
    if SECOND >= 0:
        second_count = tl.load(numbers_ptr + 6)
    for ranking in tl.static_range(1 + (SECOND >= 0)):
        wanted = first_count if ranking == 0 else second_count
        for tie in tl.static_range(2):
            # The largest bound that at least so many reach; keys first, then positions.
            low = least if tie == 0 else tl.full([], -1, tl.int64)
            high = tl.full([], 2**31 - 1, tl.int64)
            while low < high:
                middle = low + (high - low + 1) // 2
                reached = tl.full([], 0, tl.int64)
                for start in range(0, num_candidates, TILE):
                    if not ONE_TILE:
                        place, real, position, first, second = _tile(
                            start,
                            num_candidates,
                            now,
                            first_query,
                            sink_tokens,
                            ids_ptr,
                            position_ptr,
                            mass_ptr,
                            peak_ptr,
                            given_ptr,
                            FIRST,
                            SECOND,
                            HEADS,
                            BLOCK_SIZE,
                            TILE,
                        )
                    if ranking == 0:
                        left = real
                        key = first
                        bound = first_key
                    else:
                        taken = (first > first_key) | (
                            (first == first_key) & (position >= first_position)
                        )
                        left = real & ~(taken & (first_count > 0))
                        key = second
                        bound = second_key
                    if tie == 0:
                        enough = left & (key >= middle)
                    else:
                        enough = left & ((key > bound) | ((key == bound) & (position >= middle)))
                    reached += tl.sum(enough.to(tl.int32), 0)
                if reached >= wanted:
                    low = middle
                else:
                    high = middle - 1
            if ranking == 0:
                if tie == 0:
                    first_key = low
                else:
                    first_position = low
            else:
                if tie == 0:
                    second_key = low
                else:
                    second_position = low

    num_sources = 0
    num_targets = 0
    source_ptr += item * list_stride
    target_ptr += item * list_stride
    for start in range(0, num_candidates, TILE):
        if not ONE_TILE:
            place, real, position, first, second = _tile(
                start,
                num_candidates,
                now,
                first_query,
                sink_tokens,
                ids_ptr,
                position_ptr,
                mass_ptr,
                peak_ptr,
                given_ptr,
                FIRST,
                SECOND,
                HEADS,
                BLOCK_SIZE,
                TILE,
            )
        kept = (first > first_key) | ((first == first_key) & (position >= first_position))
        kept = kept & (first_count > 0)
        if SECOND >= 0:
            also = (second > second_key) | ((second == second_key) & (position >= second_position))
            kept = kept | (also & (second_count > 0))
        moving = (real & kept & (place >= room)).to(tl.int32)
        hole = (real & ~kept & (place < room)).to(tl.int32)
        # Positions of a head differ, so nothing is ever cut off; but no list is written beyond its
        # end, whatever they hold.
        rank = num_sources + tl.cumsum(moving, 0) - 1
        tl.store(source_ptr + rank, place, mask=(moving != 0) & (rank < list_stride))
        rank = num_targets + tl.cumsum(hole, 0) - 1
        tl.store(target_ptr + rank, place, mask=(hole != 0) & (rank < list_stride))
        num_sources += tl.sum(moving, 0)
        num_targets += tl.sum(hole, 0)
    num_moves = tl.minimum(tl.minimum(num_sources, num_targets), list_stride)
    tl.store(count_ptr + item, num_moves)


def choose_tokens(
    block_ids: torch.Tensor,
    numbers: torch.Tensor,
    scores: Mapping[str, torch.Tensor],
    rankings: tuple[int, ...],
    *,
    sink_tokens: int,
    most_candidates: int,
    most_moves: int,
    given: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What moves where so that every head's region holds its best tokens.

    Each head finds by bisection the rank that as many tokens reach as it may keep; equal ranks go
    to the later token. A head's tokens are one program's: it reads 8 to 12 bytes of each token, up
    to 64 times where they do not fit into registers (from L2 then). It is bound by these passes: on
    an H100 it reaches 0.7 to 3.5% of a copy's bandwidth (results/kernels-gpu.json).

    Args:
        block_ids: int64 ``[requests, blocks]``, candidates in order.
        numbers: int64 ``[requests, 5 + rankings]``: tokens that are candidates, slots of the
            region, tokens processed, the first of them whose query is scored, seed, and how many
            tokens each ranking takes.
        scores: ``position``, and ``mass`` and ``peak`` where a ranking needs them, of all layers
            (``attention.token_scores.TokenScores``).
        rankings: one or two of ``MASS``, ``MEAN``, ``PEAK``, ``POSITION``, ``GIVEN``.
        sink_tokens: so many first tokens of a sequence always stay.
        most_candidates: no request has more.
        most_moves: no head moves more.
        given: float32 ``[requests, layers, heads, tokens]``, ranks of the candidates, for
            ``GIVEN``.

    Returns:
        source and target, int32 ``[requests, layers, heads, most_moves]``, and their number, int32
        ``[requests, layers, heads]`` (as ``attention.token_choice.moves``).

    """
    position = scores["position"]
    layers, _, heads, block_size = position.shape
    shape = (len(block_ids), layers, heads)
    source = torch.empty(*shape, most_moves, dtype=torch.int32, device=position.device)
    target = torch.empty_like(source)
    count = torch.empty(shape, dtype=torch.int32, device=position.device)
    # Few shapes: each is compiled when it comes.
    tile = _SMALL_TILE if most_candidates <= _SMALL_TILE else _LARGE_TILE
    _choose_kernel[(len(block_ids), layers * heads)](
        block_ids,
        numbers,
        position,
        scores.get("mass", position),
        scores.get("peak", position),
        position if given is None else given,
        source,
        target,
        count,
        block_ids.stride(0),
        numbers.stride(0),
        most_moves,
        position.stride(0),
        0 if given is None else given.stride(2),
        sink_tokens,
        FIRST=rankings[0],
        SECOND=rankings[1] if len(rankings) > 1 else -1,
        HEADS=heads,
        BLOCK_SIZE=block_size,
        TILE=tile,
        ONE_TILE=most_candidates <= tile,
        num_warps=2 if tile <= 512 else 8,
    )
    return source, target, count
