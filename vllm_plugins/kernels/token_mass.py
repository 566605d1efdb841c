"""Attention mass and peak of single tokens, by KV head: scores at token granularity."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import TOKENS_NEEDED, TOKENS_SCORED
from .attention_mass import Queries, launch

_NEEDED = tl.constexpr(TOKENS_NEEDED)


def add_token_mass(
    queries: Queries, mass: torch.Tensor, peak: torch.Tensor | None, **options: Any
) -> None:
    """Add this step's attention to the scores of the tokens it went to, for one layer.

    Args:
        queries: of the step; rows without the flag ``TOKENS_SCORED`` are skipped. A row with a
            window (``WINDOW_SHIFT``) scores so many last queries, and forgets older mass if it has
            as many.
        mass: float32 ``[num_blocks, num_kv_heads, block_size]``, summed over the queries of the KV
            head's group.
        peak: the like, the largest probability ever given; or None. It knows no age.
        options: as ``attention_mass.launch``. With a decay, older mass ages by the tokens of a
            chunk, and by ``decode_weight`` for a decode's query, which stands for so many.

    Each token of a head is one program's alone, which sees all queries: no atomics, and the same
    sum every time. Cost: as ``add_block_mass``, and 8 bytes (16 with ``peak``) read and written
    per token and KV head.

    On an H100 (results/kernels-gpu.json) decode reaches 86% of a copy's bandwidth with 128 rows of
    4,096 tokens, 60% with 96 of 448. All queries of a chunk take 0.85 to 0.96 of FlashAttention's
    time.

    """
    launch(queries, TOKENS_SCORED, mass, peak, by_token=True, **options)


@triton.jit
def _start_kernel(
    slot_ptr,
    query_start_ptr,
    lens_ptr,
    flags_ptr,
    position_ptr,
    mass_ptr,
    peak_ptr,
    layer_stride,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MASS: tl.constexpr,
    PEAK: tl.constexpr,
    N: tl.constexpr,
):
    row = tl.program_id(0)
    if (tl.load(flags_ptr + row) & _NEEDED) == 0:
        return
    query_start = tl.load(query_start_ptr + row)
    num_queries = tl.load(query_start_ptr + row + 1) - query_start
    first_position = tl.load(lens_ptr + row) - num_queries
    head = tl.arange(0, HEADS_PADDED)[None, :]
    for start in range(tl.program_id(1) * N, num_queries, tl.num_programs(1) * N):
        token = start + tl.arange(0, N)
        slot = tl.load(slot_ptr + query_start + token, mask=token < num_queries, other=-1)
        block = slot // BLOCK_SIZE
        real = (slot >= 0)[:, None] & (head < HEADS)
        at = (block * (HEADS * BLOCK_SIZE) + slot % BLOCK_SIZE)[:, None] + head * BLOCK_SIZE
        position = (first_position + token)[:, None] + tl.zeros([N, HEADS_PADDED], tl.int32)
        zero = tl.zeros([N, HEADS_PADDED], tl.float32)
        there = at
        for _ in range(LAYERS):
            tl.store(position_ptr + there, position, mask=real)
            if MASS:
                tl.store(mass_ptr + there, zero, mask=real)
            if PEAK:
                tl.store(peak_ptr + there, zero, mask=real)
            there += layer_stride


def start_tokens(
    slot_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    flags: torch.Tensor,
    position: torch.Tensor,
    mass: torch.Tensor,
    peak: torch.Tensor,
    max_query_len: int,
) -> None:
    """Note the places of a step's new tokens and zero their scores, in all layers of a group.

    Launched before the step's attention, in its stream: a slot's former owner cannot be read
    afterwards.

    Args:
        slot_mapping: int64 ``[num_tokens]``, ``block * block_size + offset``; -1 = padding.
        query_start_loc, seq_lens: int32 ``[num_rows + 1]`` and ``[num_rows]``; lengths with evicted
            tokens.
        flags: int32 ``[num_rows]``; rows without ``TOKENS_NEEDED`` are skipped.
        position: int32 ``[layers, num_blocks, num_kv_heads, block_size]``.
        mass, peak: float32, the like; of no size where nobody asks for them.
        max_query_len: no row has more queries.

    Writes 4 to 12 bytes per token, KV head and layer.

    """
    layers, _, heads, block_size = position.shape
    grid = (len(seq_lens), min(64, triton.cdiv(max(1, max_query_len), 16)))
    _start_kernel[grid](
        slot_mapping,
        query_start_loc,
        seq_lens,
        flags,
        position,
        mass,
        peak,
        position.stride(0),
        LAYERS=layers,
        HEADS=heads,
        HEADS_PADDED=triton.next_power_of_2(heads),
        BLOCK_SIZE=block_size,
        MASS=mass.numel() > 0,
        PEAK=peak.numel() > 0,
        N=16,
        num_warps=1,
    )
