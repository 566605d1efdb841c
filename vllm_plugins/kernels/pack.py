"""Moves tokens, each of one head, with their scores: the second half of packing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_VECTOR = 16
"""Elements: as many as a thread loads at once, or more, whatever their type."""


@dataclass(frozen=True)
class Caches:
    """Caches of a layer group's layers, as one launch addresses them.

    Attributes:
        first: the first layer's, ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``.
        offsets: of each layer's from that one, int64 ``[layers]``, in elements.
        aligned: what every offset is a multiple of, 16 or 1. A pointer that a kernel works out from
            what it reads is of no known alignment, and nothing is loaded from it in vectors.

    """

    first: torch.Tensor
    offsets: torch.Tensor
    aligned: int

    @classmethod
    def of(cls, kv_caches: Sequence[torch.Tensor]) -> Caches:
        """However vLLM allocated them."""
        first, size = kv_caches[0].data_ptr(), kv_caches[0].element_size()
        offsets = [(cache.data_ptr() - first) // size for cache in kv_caches]
        aligned = _VECTOR if all(offset % _VECTOR == 0 for offset in offsets) else 1
        device = kv_caches[0].device
        return cls(kv_caches[0], torch.tensor(offsets, dtype=torch.int64, device=device), aligned)


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
    ALIGNED: tl.constexpr,
    MASS: tl.constexpr,
    PEAK: tl.constexpr,
    N: tl.constexpr,
):
    request = tl.program_id(0)
    layer = tl.program_id(1) // HEADS
    head = tl.program_id(1) % HEADS
    item = (request * num_layers + layer) * HEADS + head
    count = tl.load(count_ptr + item)
    offset = tl.multiple_of(tl.load(offsets_ptr + first_layer + layer), ALIGNED)
    base = cache_ptr + offset + head * cache_head_stride
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


def move_tokens(
    caches: Caches,
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
        caches: of ``words``.
        block_ids: int64 ``[requests, blocks]``, candidates.
        source, target: int32 ``[requests, layers, num_kv_heads, most moves]``, places among the
            candidates' slots.
        count: int32 ``[requests, layers, num_kv_heads]``, moves.
        scores: ``position``, ``mass``, ``peak``, as many as there are, each of all layers
            (``attention.token_scores.TokenScores``).
        first_layer: that of ``source`` among all layers.

    Reads and writes ``2 * head_size`` elements and 4 to 12 bytes per move, no FLOPs. On an H100 it
    reaches 52 to 71% of a copy's bandwidth (results/kernels-gpu.json).

    """
    requests, layers, heads, most = source.shape
    position = scores["position"]
    kv_cache = caches.first
    block_size, width = kv_cache.shape[2:]
    tile = 8
    grid = (requests, layers * heads, min(16, triton.cdiv(max(1, most), tile)))
    _move_kernel[grid](
        kv_cache,
        caches.offsets,
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
        ALIGNED=caches.aligned,
        MASS="mass" in scores,
        PEAK="peak" in scores,
        N=tile,
        num_warps=4,
    )
