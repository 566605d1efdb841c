"""Attention mass by block or by token, from FlashAttention's log-sum-exp, in one pass over keys.

The kernel and its launch; ``block_mass.py`` and ``token_mass.py`` say what it is for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from . import FRACTION_BITS, WINDOW_SHIFT, scale_stride

_LOG2E = tl.constexpr(1.4426950408889634)
_ONE = tl.constexpr(2.0**FRACTION_BITS)
_WINDOW_SHIFT = tl.constexpr(WINDOW_SHIFT)


@triton.jit
def _probabilities(
    keys,
    queries,
    lse,
    scale,
    soft_cap,
    SOFT_CAP: tl.constexpr,
):
    """``[N, M]``: attention of each query row to each key; keys stand first, so that the sum
    over queries runs along a row of the tensor core's result. ``lse`` in base 2."""
    # Products of 8-bit numbers are exact in float16's tensor cores, which add up in float32; those
    # of 8-bit operands would not add up as exactly.
    if queries.dtype.is_fp8():
        queries = queries.to(tl.float16)
    logits = tl.dot(keys.to(queries.dtype), tl.trans(queries))
    if SOFT_CAP:
        # tanh by exp2, which saturates rather than overflows at both ends.
        squashed = 2.0 / (1.0 + tl.exp2(logits * (scale * (-2.0 / soft_cap)) * _LOG2E)) - 1.0
        logits = squashed * (soft_cap * _LOG2E)
    else:
        logits = logits * (scale * _LOG2E)
    return tl.exp2(logits - lse[None, :])


@triton.jit
def _query_rows(
    start,
    num_rows,
    query_ptr,
    lse_ptr,
    query_token_stride,
    query_head_stride,
    lse_head_stride,
    first_token,
    stride,
    first_head,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    M: tl.constexpr,
):
    """Row ``r`` is head ``r % GROUP`` of the group for scored query ``r // GROUP``, which lies
    ``stride`` tokens behind the one before. Rows past the end get an infinite log-sum-exp: a
    probability of 0. Also returned: the log-sum-exp in base 2, tokens after the first scored."""
    r = start + tl.arange(0, M)
    real = r < num_rows
    after = r // GROUP * stride
    token = (first_token + after).to(tl.int64)
    head = first_head + r % GROUP
    dim = tl.arange(0, HEAD_PADDED)
    queries = tl.load(
        query_ptr + (token * query_token_stride + head * query_head_stride)[:, None] + dim[None, :],
        mask=real[:, None] & (dim < HEAD_SIZE)[None, :],
        other=0.0,
    )
    lse = tl.load(lse_ptr + head * lse_head_stride + token, mask=real, other=float("inf"))
    return queries, lse * _LOG2E, after


@triton.jit(
    do_not_specialize=[
        "row_offset",
        "window",
        "decode_weight",
        "skip",
        "stride",
        "lse_head_stride",
        "query_scale_stride",
        "key_scale_stride",
    ]
)
def _mass_kernel(
    query_ptr,
    cache_ptr,
    lse_ptr,
    table_ptr,
    lens_ptr,
    query_start_ptr,
    flags_ptr,
    mass_ptr,
    peak_ptr,
    query_scale_ptr,
    key_scale_ptr,
    row_offset,
    window,
    decode_weight,
    skip,
    stride,
    scale,
    soft_cap,
    log2_decay,
    query_token_stride,
    query_head_stride,
    lse_head_stride,
    cache_block_stride,
    cache_head_stride,
    cache_token_stride,
    table_stride,
    scores_block_stride,
    query_scale_stride,
    key_scale_stride,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    ONE_QUERY: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    DECAY: tl.constexpr,
    FLAG: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    PEAK: tl.constexpr,
):
    row = row_offset + tl.program_id(2)
    # Heads run fastest: a block's heads lie side by side, and in a chunk the tiles with the most
    # queries (the first keys) start first.
    kv_head = tl.program_id(0)
    seq_len = tl.load(lens_ptr + row)
    first_key = tl.program_id(1) * N
    flags = tl.load(flags_ptr + row)
    if (flags & FLAG) == 0 or first_key >= seq_len:
        return
    query_start = tl.load(query_start_ptr + row)
    num_queries = tl.load(query_start_ptr + row + 1) - query_start
    if num_queries == 0:
        return
    last = tl.minimum(num_queries, window)
    afresh = False
    if BY_TOKEN:
        # A request's own window takes the place of the server's, and is scored in full.
        own = flags >> _WINDOW_SHIFT
        if skip > 0 and own > 0:
            return
        last = tl.minimum(num_queries, tl.where(own > 0, own, window))
        afresh = (own > 0) & (num_queries >= own)
    # Places of the queries that are scored, among the live tokens.
    first_place = seq_len - last
    first_place += (stride - first_place % stride) % stride
    end_place = seq_len - skip
    if first_place >= end_place or first_key >= end_place:
        return
    num_rows = (end_place - first_place + stride - 1) // stride * GROUP
    weight = tl.where(num_queries == 1, decode_weight, stride).to(tl.float32)
    first_token = query_start + num_queries - seq_len + first_place
    first_head = kv_head * GROUP
    if query_scale_ptr is not None:
        scale *= tl.load(query_scale_ptr + kv_head * query_scale_stride)
    if key_scale_ptr is not None:
        scale *= tl.load(key_scale_ptr + kv_head * key_scale_stride)
    table_ptr += row * table_stride
    dim = tl.arange(0, HEAD_PADDED)
    key = tl.arange(0, N)
    block = tl.arange(0, N // BLOCK_SIZE)

    if ONE_QUERY:
        queries, lse, _ = _query_rows(
            0,
            num_rows,
            query_ptr,
            lse_ptr,
            query_token_stride,
            query_head_stride,
            lse_head_stride,
            first_token,
            stride,
            first_head,
            GROUP,
            HEAD_SIZE,
            HEAD_PADDED,
            M,
        )
    for start in range(first_key, seq_len, tl.num_programs(1) * N):
        place = start + key
        ids = tl.load(table_ptr + place // BLOCK_SIZE, mask=place < seq_len, other=0).to(tl.int64)
        at = ids * cache_block_stride + (place % BLOCK_SIZE) * cache_token_stride
        keys = tl.load(
            cache_ptr + at[:, None] + kv_head * cache_head_stride + dim[None, :],
            mask=(place < seq_len)[:, None] & (dim < HEAD_SIZE)[None, :],
            other=0.0,
        )
        total = tl.zeros([N], tl.float32)
        highest = tl.zeros([N], tl.float32)
        if ONE_QUERY:
            p = _probabilities(keys, queries, lse, scale, soft_cap, SOFT_CAP)
            p = tl.where((place < seq_len)[:, None], p, 0.0)
            total += tl.sum(p, 1)
            if PEAK:
                highest = tl.maximum(highest, tl.max(p, 1))
        else:
            # Queries before `start` see none of these keys, those from the tile's end on all.
            begin = tl.maximum(start - first_place, 0) // stride * GROUP // M * M
            full = (tl.maximum(start + N - 1 - first_place, 0) + stride - 1) // stride
            diagonal = tl.minimum(full * GROUP, num_rows)
            diagonal = (diagonal + M - 1) // M * M
            for r in range(begin, diagonal, M):
                queries, lse, after = _query_rows(
                    r,
                    num_rows,
                    query_ptr,
                    lse_ptr,
                    query_token_stride,
                    query_head_stride,
                    lse_head_stride,
                    first_token,
                    stride,
                    first_head,
                    GROUP,
                    HEAD_SIZE,
                    HEAD_PADDED,
                    M,
                )
                p = _probabilities(keys, queries, lse, scale, soft_cap, SOFT_CAP)
                p = tl.where(place[:, None] <= (first_place + after)[None, :], p, 0.0)
                if PEAK:
                    highest = tl.maximum(highest, tl.max(p, 1))
                if DECAY:
                    age = seq_len - 1 - first_place - after
                    p *= tl.exp2(log2_decay * age.to(tl.float32))[None, :]
                total += tl.sum(p, 1)
            for r in range(tl.maximum(begin, diagonal), num_rows, M):
                queries, lse, after = _query_rows(
                    r,
                    num_rows,
                    query_ptr,
                    lse_ptr,
                    query_token_stride,
                    query_head_stride,
                    lse_head_stride,
                    first_token,
                    stride,
                    first_head,
                    GROUP,
                    HEAD_SIZE,
                    HEAD_PADDED,
                    M,
                )
                p = _probabilities(keys, queries, lse, scale, soft_cap, SOFT_CAP)
                if PEAK:
                    highest = tl.maximum(highest, tl.max(p, 1))
                if DECAY:
                    # Rows past the end would weigh more than 1, times a probability of 0.
                    age = seq_len - 1 - first_place - after
                    p *= tl.exp2(log2_decay * age.to(tl.float32))[None, :]
                total += tl.sum(p, 1)
        if BY_TOKEN:
            # No other program of the launch comes to this head's key: no atomics.
            real = place < seq_len
            score = ids * scores_block_stride + kv_head * BLOCK_SIZE + place % BLOCK_SIZE
            known = tl.load(mass_ptr + score, mask=real, other=0.0)
            if DECAY:
                elapsed = tl.where(num_queries == 1, decode_weight, num_queries).to(tl.float32)
                known *= tl.exp2(log2_decay * elapsed)
            known = tl.where(afresh, 0.0, known)
            tl.store(mass_ptr + score, known + total * weight, mask=real)
            if PEAK:
                known = tl.load(peak_ptr + score, mask=real, other=0.0)
                tl.store(peak_ptr + score, tl.maximum(known, highest), mask=real)
        else:
            by_block = tl.sum(tl.reshape(total, [N // BLOCK_SIZE, BLOCK_SIZE]), 1)
            column = start // BLOCK_SIZE + block
            real = column * BLOCK_SIZE < seq_len
            owner = tl.load(table_ptr + column, mask=real, other=0)
            tl.atomic_add(mass_ptr + owner, (by_block * (weight * _ONE)).to(tl.int64), mask=real)


@dataclass(frozen=True)
class Tile:
    """Shape of one program's work: query rows, keys, warps, pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


# The fastest of a sweep on an H100 (scripts/bench_kernels --sweep).
DECODE = Tile(rows=16, keys=64, warps=2, stages=4)
CHUNK = Tile(rows=128, keys=128, warps=4, stages=2)
WINDOW = Tile(rows=64, keys=256, warps=4, stages=2)


@dataclass(frozen=True)
class Queries:
    """This step's queries over a paged cache, as every layer sees them.

    Attributes:
        query: ``[num_tokens, num_heads, head_size]``; float8 where vLLM quantises queries.
        kv_cache: ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``, keys in the first
            half of the last axis (``vllm/v1/attention/backends/flash_attn.py``); float8 as such,
            not as bytes.
        lse: float32 ``[num_heads, >= num_tokens]``, natural logarithm, as FlashAttention computed
            it over the very same keys: the sum over keys is exactly the attention that was paid,
            and nothing is normalised twice.
        block_table, seq_lens: compacted; int32 ``[num_rows, width]`` and ``[num_rows]``.
        query_start_loc: int32 ``[num_rows + 1]``.
        flags: int32 ``[num_rows]``; rows without the flag asked for are skipped.
        scale, soft_cap: of the logits; ``soft_cap`` 0 = off.
        query_scale, key_scale: float32 of one element, or of one a KV head: what numbers of the
            query and of the cache count; None: they are what they are.

    """

    query: torch.Tensor
    kv_cache: torch.Tensor
    lse: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    flags: torch.Tensor
    scale: float
    soft_cap: float = 0.0
    query_scale: torch.Tensor | None = None
    key_scale: torch.Tensor | None = None


def launch(
    queries: Queries,
    flag: int,
    mass: torch.Tensor,
    peak: torch.Tensor | None,
    *,
    by_token: bool,
    rows: tuple[int, int],
    max_seq_len: int,
    one_query: bool,
    window: int | None = None,
    decode_weight: int = 1,
    skip: int = 0,
    stride: int = 1,
    log2_decay: float = 0.0,
    tile: Tile | None = None,
    programs: int = 2048,
) -> None:
    """Add the attention of a step's queries to ``mass``, and take its maximum into ``peak``.

    Args:
        queries: of the step.
        flag: which rows take part.
        mass: int64 ``[num_blocks]``, fixed point; or by token, float32
            ``[num_blocks, num_kv_heads, block_size]``.
        peak: the like of ``mass`` by token, or None.
        by_token: which of the two.
        rows: half-open range of rows to work on.
        max_seq_len: no row of the range is longer (live tokens).
        one_query: no row of the range has more than one query (decode).
        window: only so many last queries of a row count.
        decode_weight: a row with one query counts it so many times (``score_query_stride``).
        skip: the last so many queries of a row do not count, nor do rows with windows of their own;
            another launch scores them.
        stride: only the queries at places that it divides count, and each counts so many times. It
            divides the block size, so that it is the same ones before an eviction and after.
        log2_decay: log2 of the weight lost per token of age within the chunk; 0 = none. By token
            not together with ``skip``: scores would age in either launch.
        tile: shape of the work; by default ``DECODE``, ``CHUNK``, or ``WINDOW`` for few queries.
        programs: decode rows are split over programs until about so many have work. Of
            ``decode_weight`` rows one is expected to: which ones are is known when a graph is
            replayed, their number when it is captured.

    """
    start, stop = rows
    if stop <= start or max_seq_len <= 0:
        return
    query, kv_cache = queries.query, queries.kv_cache
    num_heads, head_size = query.shape[1:]
    num_kv_heads, block_size = kv_cache.shape[1:3]
    group = num_heads // num_kv_heads
    if tile is None and not one_query:
        tile = CHUNK if window is None or window * group > 512 else WINDOW
    tile = tile or DECODE
    if head_size > 128:  # a tile of keys must fit into shared memory
        tile = replace(tile, rows=min(tile.rows, 64), keys=min(tile.keys, 64))
    keys = max(tile.keys, block_size)
    num_rows = max(16, triton.next_power_of_2(group)) if one_query else tile.rows
    num_tiles = triton.cdiv(max_seq_len, keys)
    if one_query:
        scored = triton.cdiv(stop - start, decode_weight)
        num_tiles = min(num_tiles, triton.cdiv(programs, scored * num_kv_heads))
    _mass_kernel[(num_kv_heads, num_tiles, stop - start)](
        query,
        kv_cache,
        queries.lse,
        queries.block_table,
        queries.seq_lens,
        queries.query_start_loc,
        queries.flags,
        mass,
        mass if peak is None else peak,
        queries.query_scale,
        queries.key_scale,
        start,
        window if window is not None else 2**30,
        decode_weight,
        skip,
        stride,
        queries.scale,
        queries.soft_cap,
        log2_decay,
        query.stride(0),
        query.stride(1),
        queries.lse.stride(0),
        kv_cache.stride(0),
        kv_cache.stride(1),
        kv_cache.stride(2),
        queries.block_table.stride(0),
        num_kv_heads * block_size,
        scale_stride(queries.query_scale),
        scale_stride(queries.key_scale),
        GROUP=group,
        HEAD_SIZE=head_size,
        HEAD_PADDED=triton.next_power_of_2(head_size),
        BLOCK_SIZE=block_size,
        M=num_rows,
        N=keys,
        ONE_QUERY=one_query,
        SOFT_CAP=queries.soft_cap > 0.0,
        DECAY=log2_decay < 0.0,
        FLAG=flag,
        BY_TOKEN=by_token,
        PEAK=peak is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
