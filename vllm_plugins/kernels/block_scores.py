"""Block scores beside attention mass: zero for a reused block, key norms, ageing."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import FRACTION_BITS, NEEDED, SCORED, scale_stride

_ONE = tl.constexpr(2.0**FRACTION_BITS)
_NEEDED = tl.constexpr(NEEDED)
_SCORED = tl.constexpr(SCORED)


@triton.jit(do_not_specialize=["num_tokens"])
def _start_kernel(
    slot_ptr, num_tokens, mass_ptr, queries_ptr, norm_ptr, BLOCK_SIZE: tl.constexpr, N: tl.constexpr
):
    token = tl.program_id(0) * N + tl.arange(0, N)
    slot = tl.load(slot_ptr + token, mask=token < num_tokens, other=-1)
    first = (slot >= 0) & (slot % BLOCK_SIZE == 0)
    block = slot // BLOCK_SIZE
    zero = tl.zeros([N], tl.int64)
    tl.store(mass_ptr + block, zero, mask=first)
    tl.store(queries_ptr + block, zero, mask=first)
    tl.store(norm_ptr + block, zero, mask=first)


def start_blocks(
    slot_mapping: torch.Tensor,
    block_size: int,
    mass: torch.Tensor,
    num_queries: torch.Tensor,
    norm: torch.Tensor,
) -> None:
    """Zero the scores of every block whose first token is written in this step.

    Runs in the stream of the write itself, so whoever owned the block before cannot be read
    afterwards; a block being filled over several steps is zeroed once.

    Args:
        slot_mapping: int64 ``[num_tokens]``, ``block * block_size + offset``; -1 = padding.
        block_size: tokens per block.
        mass, num_queries, norm: int64 ``[num_blocks]``.

    Reads 8 bytes a token, writes 24 a fresh block.

    """
    n = len(slot_mapping)
    _start_kernel[(triton.cdiv(n, 256),)](
        slot_mapping, n, mass, num_queries, norm, BLOCK_SIZE=block_size, N=256, num_warps=2
    )


@triton.jit(do_not_specialize=["key_scale_stride", "value_scale_stride"])
def _key_norm_kernel(
    slot_ptr,
    cache_ptr,
    norm_ptr,
    key_scale_ptr,
    value_scale_ptr,
    block_stride,
    head_stride,
    token_stride,
    key_scale_stride,
    value_scale_stride,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
):
    token = tl.program_id(0)
    slot = tl.load(slot_ptr + token)
    if slot < 0:
        return
    heads = tl.arange(0, HEADS_PADDED)
    head, dim = heads[:, None], tl.arange(0, HEAD_PADDED)[None, :]
    real = (head < HEADS) & (dim < HEAD_SIZE)
    at = cache_ptr + slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * token_stride
    key_at = at + head * head_stride + dim
    key = tl.load(key_at, mask=real, other=0.0).to(tl.float32)
    value = tl.load(key_at + HEAD_SIZE, mask=real, other=0.0).to(tl.float32)
    key_norm = tl.sqrt(tl.sum(key * key, 1))
    value_norm = tl.sqrt(tl.sum(value * value, 1))
    if key_scale_ptr is not None:
        scale = key_scale_ptr + heads * key_scale_stride
        key_norm *= tl.load(scale, mask=heads < HEADS, other=1.0)
    if value_scale_ptr is not None:
        scale = value_scale_ptr + heads * value_scale_stride
        value_norm *= tl.load(scale, mask=heads < HEADS, other=1.0)
    ratio = tl.sum(value_norm / tl.maximum(key_norm, 1e-6), 0) / BLOCK_SIZE
    tl.atomic_add(norm_ptr + slot // BLOCK_SIZE, (ratio * _ONE).to(tl.int64))


def add_key_norms(
    slot_mapping: torch.Tensor,
    kv_cache: torch.Tensor,
    norm: torch.Tensor,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> None:
    """Add each new token's ``||v|| / ||k||``, summed over KV heads, over the size of a block.

    Launched after the tokens were written: a quantised cache has other norms than what went in,
    and attention sees the cache.

    Args:
        slot_mapping: int64 ``[num_tokens]``; -1 = padding.
        kv_cache: ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``, float8 as such.
        norm: int64 ``[num_blocks]``, fixed point.
        key_scale, value_scale: as ``attention_mass.Queries``.

    Reads the step's new keys and values once: nothing beside what attention reads.

    """
    _, heads, block_size, width = kv_cache.shape
    head_size = width // 2
    _key_norm_kernel[(len(slot_mapping),)](
        slot_mapping,
        kv_cache,
        norm,
        key_scale,
        value_scale,
        kv_cache.stride(0),
        kv_cache.stride(1),
        kv_cache.stride(2),
        scale_stride(key_scale),
        scale_stride(value_scale),
        BLOCK_SIZE=block_size,
        HEADS=heads,
        HEADS_PADDED=triton.next_power_of_2(heads),
        HEAD_SIZE=head_size,
        HEAD_PADDED=triton.next_power_of_2(head_size),
        num_warps=1,
    )


@triton.jit(do_not_specialize=["window", "decode_weight"])
def _age_kernel(
    table_ptr,
    lens_ptr,
    query_start_ptr,
    flags_ptr,
    mass_ptr,
    queries_ptr,
    table_stride,
    window,
    decode_weight,
    log2_decay,
    BLOCK_SIZE: tl.constexpr,
    DECAY: tl.constexpr,
    N: tl.constexpr,
):
    row = tl.program_id(0)
    flag = tl.load(flags_ptr + row)
    seq_len = tl.load(lens_ptr + row)
    if (flag & _NEEDED) == 0 or seq_len == 0:
        return
    num_queries = tl.load(query_start_ptr + row + 1) - tl.load(query_start_ptr + row)
    num_blocks = (seq_len + BLOCK_SIZE - 1) // BLOCK_SIZE
    for start in range(0, num_blocks, N):
        column = start + tl.arange(0, N)
        real = column < num_blocks
        block = tl.load(table_ptr + row * table_stride + column, mask=real, other=0).to(tl.int64)
        if DECAY:
            mass = tl.load(mass_ptr + block, mask=real, other=0).to(tl.float64)
            # Live blocks have one owner: no other program touches this entry.
            aged = mass * tl.exp2(log2_decay * num_queries).to(tl.float64)
            tl.store(mass_ptr + block, aged.to(tl.int64), mask=real)
        elif (flag & _SCORED) != 0:
            seen = tl.minimum(seq_len - column * BLOCK_SIZE, tl.minimum(num_queries, window))
            seen *= tl.where(num_queries == 1, decode_weight, 1)
            known = tl.load(queries_ptr + block, mask=real, other=0)
            tl.store(queries_ptr + block, known + seen, mask=real)


def age_blocks(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    flags: torch.Tensor,
    mass: torch.Tensor,
    num_queries: torch.Tensor,
    *,
    block_size: int,
    window: int,
    decode_weight: int = 1,
    log2_decay: float,
) -> None:
    """Once per step and layer group, before its scores are added.

    With ``log2_decay < 0``, mass fades by the step's tokens, scored or not. With 0, the queries
    that see each block are counted (``score="mean"`` divides by them).

    Args:
        block_table, seq_lens: compacted, int32 ``[num_rows, width]`` and ``[num_rows]``.
        query_start_loc: int32 ``[num_rows + 1]``.
        flags: int32 ``[num_rows]`` of ``NEEDED | SCORED``.
        mass, num_queries: int64 ``[num_blocks]``.
        block_size: tokens per block.
        window: so many last queries of a row are scored.
        decode_weight: a row with one query counts it so many times (``score_query_stride``).
        log2_decay: log2 of the weight that is left after one token.

    Reads 12 and writes 8 bytes a live block.

    """
    _age_kernel[(len(seq_lens),)](
        block_table,
        seq_lens,
        query_start_loc,
        flags,
        mass,
        num_queries,
        block_table.stride(0),
        window,
        decode_weight,
        log2_decay,
        BLOCK_SIZE=block_size,
        DECAY=log2_decay < 0.0,
        N=256,
        num_warps=2,
    )
