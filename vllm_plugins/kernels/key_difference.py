"""How little each token's key looks like the mean key of its head, in one launch.

``attention/token_choice.py`` says the same in torch. Sums run in another order there, so the two
differ by rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .pack import Caches

_TILE = 64
_SMALLEST = tl.constexpr(1e-12)
"""Shorter vectors are divided by this, as ``torch.nn.functional.normalize`` does."""


@triton.jit
def _unit_keys(
    start,
    num_candidates,
    ids_ptr,
    cache_ptr,
    cache_block_stride,
    cache_token_stride,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Places of a tile of candidates, which are some, and their keys at length 1,
    ``[TILE, HEAD_PADDED]``; 0 where there is none."""
    place = start + tl.arange(0, TILE)
    dim = tl.arange(0, HEAD_PADDED)
    real = place < num_candidates
    block = tl.load(ids_ptr + place // BLOCK_SIZE, mask=real, other=0)
    at = block * cache_block_stride + place % BLOCK_SIZE * cache_token_stride
    keys = tl.load(
        cache_ptr + at[:, None] + dim[None, :],
        mask=real[:, None] & (dim < HEAD_SIZE)[None, :],
        other=0.0,
    ).to(tl.float32)
    norm = tl.sqrt(tl.sum(keys * keys, 1))
    return place, real, keys / tl.maximum(norm, _SMALLEST)[:, None]


# No integer is specialised: each would compile the kernel anew, in the middle of serving.
@triton.jit(do_not_specialize=["first_layer", "ids_stride", "numbers_stride", "ranks_stride"])
def _key_difference_kernel(
    cache_ptr,
    offsets_ptr,
    ids_ptr,
    numbers_ptr,
    ranks_ptr,
    first_layer,
    ids_stride,
    numbers_stride,
    ranks_stride,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    ALIGNED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    TILE: tl.constexpr,
):
    request = tl.program_id(0)
    layer = tl.program_id(1) // HEADS
    head = tl.program_id(1) % HEADS
    item = request.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    offset = tl.multiple_of(tl.load(offsets_ptr + first_layer + layer), ALIGNED)
    cache_ptr += offset + head * cache_head_stride
    ids_ptr += request * ids_stride
    ranks_ptr += item * ranks_stride
    num_candidates = tl.load(numbers_ptr + request * numbers_stride).to(tl.int32)
    # Added up by place in the tile first: a sum over the tile is one of all threads.
    totals = tl.zeros([TILE, HEAD_PADDED], tl.float32)
    for start in range(0, num_candidates, TILE):
        _, _, unit = _unit_keys(
            start,
            num_candidates,
            ids_ptr,
            cache_ptr,
            cache_block_stride,
            cache_token_stride,
            BLOCK_SIZE,
            HEAD_SIZE,
            HEAD_PADDED,
            TILE,
        )
        totals += unit
    mean = tl.sum(totals, 0) / num_candidates
    mean = mean / tl.maximum(tl.sqrt(tl.sum(mean * mean, 0)), _SMALLEST)
    for start in range(0, num_candidates, TILE):
        place, real, unit = _unit_keys(
            start,
            num_candidates,
            ids_ptr,
            cache_ptr,
            cache_block_stride,
            cache_token_stride,
            BLOCK_SIZE,
            HEAD_SIZE,
            HEAD_PADDED,
            TILE,
        )
        tl.store(ranks_ptr + place, -tl.sum(unit * mean[None, :], 1), mask=real)


def key_difference(
    caches: Caches,
    block_ids: torch.Tensor,
    numbers: torch.Tensor,
    *,
    layers: slice,
    most_candidates: int,
) -> torch.Tensor:
    """Minus the cosine of each candidate's key and the mean of its head's unit keys.

    A head's tokens are one program's, in an order that no other request changes: what is chosen
    for a request does not depend on its neighbours. A quantised cache's scales do not count, as
    every head has one.

    Args:
        caches: keys in the first half of the last axis; float8 as such.
        block_ids: int64 ``[requests, blocks]``, candidates in order.
        numbers: int64 ``[requests, any]``, tokens that are candidates first.
        layers: some of the caches' layers.
        most_candidates: no request has more.

    Returns:
        float32 ``[requests, layers, num_kv_heads, most_candidates]``; behind a request's
        candidates, anything.

    Reads every key twice, the second time from L2 where a program's keys fit into its share of it,
    for 4 or 5 FLOPs a number each time. With the choice behind it, it reaches 9 to 26% of a
    copy's bandwidth on an H100, keys counted once (results/kernels-gpu.json).

    """
    kv_cache = caches.first
    _, heads, block_size, width = kv_cache.shape
    num_layers = layers.stop - layers.start
    shape = (len(block_ids), num_layers, heads, most_candidates)
    ranks = torch.empty(shape, device=kv_cache.device)
    _key_difference_kernel[(len(block_ids), num_layers * heads)](
        kv_cache,
        caches.offsets,
        block_ids,
        numbers,
        ranks,
        layers.start,
        block_ids.stride(0),
        numbers.stride(0),
        ranks.stride(2),
        kv_cache.stride(0),
        kv_cache.stride(1),
        kv_cache.stride(2),
        ALIGNED=caches.aligned,
        HEADS=heads,
        BLOCK_SIZE=block_size,
        HEAD_SIZE=width // 2,
        HEAD_PADDED=triton.next_power_of_2(width // 2),
        TILE=_TILE,
        num_warps=4,
    )
    return ranks
