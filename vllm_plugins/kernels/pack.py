"""Moves tokens, each of one head, with their scores: the second half of packing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["first_layer", "num_layers", "ids_stride", "list_stride"])
def _move_kernel(
    cache_ptr,
    offsets_ptr,
    ids_ptr,
    source_ptr,
    target_ptr,
    count_ptr,
    position_ptr,
    mass_ptr,
    peak_ptr,
    first_layer,
    num_layers,
    ids_stride,
    list_stride,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    scores_layer_stride,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    MASS: tl.constexpr,
    PEAK: tl.constexpr,
    N: tl.constexpr,
):
    request = tl.program_id(0)
    layer = tl.program_id(1) // HEADS
    head = tl.program_id(1) % HEADS
    item = (request * num_layers + layer) * HEADS + head
    count = tl.load(count_ptr + item)
    base = cache_ptr + tl.load(offsets_ptr + first_layer + layer) + head * cache_head_stride
    scores = (first_layer + layer).to(tl.int64) * scores_layer_stride + head * BLOCK_SIZE
    ids_ptr += request * ids_stride
    part = tl.arange(0, WIDTH_PADDED)[None, :]
    for start in range(tl.program_id(2) * N, count, tl.num_programs(2) * N):
        move = start + tl.arange(0, N)
        real = move < count
        source = tl.load(source_ptr + item.to(tl.int64) * list_stride + move, mask=real, other=0)
        target = tl.load(target_ptr + item.to(tl.int64) * list_stride + move, mask=real, other=0)
        block = tl.load(ids_ptr + source // BLOCK_SIZE, mask=real, other=0).to(tl.int64)
        to_block = tl.load(ids_ptr + target // BLOCK_SIZE, mask=real, other=0).to(tl.int64)
        slot, to_slot = source % BLOCK_SIZE, target % BLOCK_SIZE
        whole = real[:, None] & (part < WIDTH)
        at = block * cache_block_stride + slot * cache_token_stride
        to = to_block * cache_block_stride + to_slot * cache_token_stride
        tokens = tl.load(base + at[:, None] + part, mask=whole)
        tl.store(base + to[:, None] + part, tokens, mask=whole)
        at = scores + block * (HEADS * BLOCK_SIZE) + slot
        to = scores + to_block * (HEADS * BLOCK_SIZE) + to_slot
        tl.store(position_ptr + to, tl.load(position_ptr + at, mask=real), mask=real)
        if MASS:
            tl.store(mass_ptr + to, tl.load(mass_ptr + at, mask=real), mask=real)
        if PEAK:
            tl.store(peak_ptr + to, tl.load(peak_ptr + at, mask=real), mask=real)


def words(kv_cache: torch.Tensor) -> torch.Tensor:
    """A cache as moves see it: of bytes two at a time, which are moved as fast as bfloat16.

    A view, int16 ``[num_blocks, num_kv_heads, block_size, head_size]`` for numbers of one byte;
    other caches as they are.
    """
    return kv_cache.view(torch.int16) if kv_cache.element_size() == 1 else kv_cache


def cache_offsets(kv_caches: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of each cache from the first one, int64 ``[layers]``, in elements.

    One launch can then serve all layers, however vLLM allocated them.
    """
    first, size = kv_caches[0].data_ptr(), kv_caches[0].element_size()
    offsets = [(cache.data_ptr() - first) // size for cache in kv_caches]
    return torch.tensor(offsets, dtype=torch.int64, device=kv_caches[0].device)


def move_tokens(
    kv_cache: torch.Tensor,
    offsets: torch.Tensor,
    block_ids: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    count: torch.Tensor,
    scores: Mapping[str, torch.Tensor],
    first_layer: int = 0,
) -> None:
    """Copy keys, values and scores of tokens to other slots of the same request, layer and head.

    No slot is both a source and a target, so the order does not matter.

    Args:
        kv_cache: of the first layer, ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``,
            of ``words``.
        offsets: of all layers' caches (``cache_offsets``).
        block_ids: int64 ``[requests, blocks]``, candidates.
        source, target: int32 ``[requests, layers, num_kv_heads, most moves]``, places among the
            candidates' slots.
        count: int32 ``[requests, layers, num_kv_heads]``, moves.
        scores: ``position``, ``mass``, ``peak``, as many as there are, each of all layers
            (``attention.token_scores.TokenScores``).
        first_layer: that of ``source`` among all layers.

    Reads and writes ``2 * head_size`` elements and 4 to 12 bytes per move, no FLOPs. On an H100 it
    reaches 45 to 47% of a copy's bandwidth (results/kernels-gpu.json).

    """
    requests, layers, heads, most = source.shape
    position = scores["position"]
    block_size, width = kv_cache.shape[2:]
    tile = 8
    grid = (requests, layers * heads, min(16, triton.cdiv(max(1, most), tile)))
    _move_kernel[grid](
        kv_cache,
        offsets,
        block_ids,
        source,
        target,
        count,
        position,
        scores.get("mass", position),
        scores.get("peak", position),
        first_layer,
        layers,
        block_ids.stride(0),
        source.stride(2),
        kv_cache.stride(0),
        kv_cache.stride(1),
        kv_cache.stride(2),
        position.stride(0),
        HEADS=heads,
        BLOCK_SIZE=block_size,
        WIDTH=width,
        WIDTH_PADDED=triton.next_power_of_2(width),
        MASS="mass" in scores,
        PEAK="peak" in scores,
        N=tile,
        num_warps=4,
    )
