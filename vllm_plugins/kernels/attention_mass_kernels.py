"""The Triton kernels of attention mass: one for decodes, one for chunks. ``attention_mass.py``
launches them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import FRACTION_BITS, WINDOW_SHIFT

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


@triton.jit
def _keys(
    start,
    seq_len,
    cache_ptr,
    table_ptr,
    cache_block_stride,
    cache_token_stride,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    N: tl.constexpr,
):
    """``[N, HEAD_PADDED]``: a head's keys of the tokens from ``start`` on; and whose they are."""
    place = start + tl.arange(0, N)
    dim = tl.arange(0, HEAD_PADDED)
    ids = tl.load(table_ptr + place // BLOCK_SIZE, mask=place < seq_len, other=0).to(tl.int64)
    at = ids * cache_block_stride + (place % BLOCK_SIZE) * cache_token_stride
    keys = tl.load(
        cache_ptr + at[:, None] + dim[None, :],
        mask=(place < seq_len)[:, None] & (dim < HEAD_SIZE)[None, :],
        other=0.0,
    )
    return keys, ids, place


@triton.jit
def _known(
    start,
    seq_len,
    ids,
    kv_head,
    mass_ptr,
    peak_ptr,
    scores_block_stride,
    BLOCK_SIZE: tl.constexpr,
    N: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    PEAK: tl.constexpr,
):
    """Mass and peak, both finite, that a head's tokens from ``start`` on have so far, and where
    they lie."""
    place = start + tl.arange(0, N)
    score = ids * scores_block_stride + kv_head * BLOCK_SIZE + place % BLOCK_SIZE
    mass = tl.zeros([N], tl.float32)
    peak = tl.zeros([N], tl.float32)
    if BY_TOKEN:
        mass = tl.load(mass_ptr + score, mask=place < seq_len, other=0.0)
        if PEAK:
            peak = tl.load(peak_ptr + score, mask=place < seq_len, other=0.0)
    return mass, peak, score


@triton.jit
def _store(
    mass,
    peak,
    score,
    start,
    seq_len,
    mass_ptr,
    peak_ptr,
    table_ptr,
    BLOCK_SIZE: tl.constexpr,
    N: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    PEAK: tl.constexpr,
):
    """By token what a head's tokens have now; by block what is to be added to all of a block."""
    if BY_TOKEN:
        # No other program of the launch comes to this head's key: no atomics.
        real = start + tl.arange(0, N) < seq_len
        tl.store(mass_ptr + score, mass, mask=real)
        if PEAK:
            tl.store(peak_ptr + score, peak, mask=real)
    else:
        by_block = tl.sum(tl.reshape(mass, [N // BLOCK_SIZE, BLOCK_SIZE]), 1)
        column = start // BLOCK_SIZE + tl.arange(0, N // BLOCK_SIZE)
        real = column * BLOCK_SIZE < seq_len
        owner = tl.load(table_ptr + column, mask=real, other=0)
        tl.atomic_add(mass_ptr + owner, (by_block * _ONE).to(tl.int64), mask=real)


@triton.jit(
    do_not_specialize=[
        "first_row",
        "end_row",
        "decode_weight",
        "lse_head_stride",
        "query_scale_stride",
        "key_scale_stride",
    ]
)
def _decode_mass_kernel(
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
    first_row,
    end_row,
    decode_weight,
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
    ROWS: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    DECAY: tl.constexpr,
    FLAG: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    PEAK: tl.constexpr,
):
    """A program has a share of the tiles of ``ROWS`` rows. Few of these are scored, and which ones
    is known only here: of programs for single rows most would start only to end."""
    kv_head = tl.program_id(0)
    programs = tl.num_programs(1)
    first_row += tl.program_id(2) * ROWS
    row = first_row + tl.arange(0, ROWS)
    real = row < end_row
    scored = real & ((tl.load(flags_ptr + row, mask=real, other=0) & FLAG) != 0)
    # A row of the padding has no query.
    query_start = tl.load(query_start_ptr + row, mask=real, other=0)
    scored &= tl.load(query_start_ptr + row + 1, mask=real, other=0) > query_start
    tiles = (tl.load(lens_ptr + row, mask=scored, other=0) + N - 1) // N
    # The tiles of all scored rows in one line; a program has so many in a row.
    until = tl.cumsum(tiles)
    num_tiles = tl.sum(tiles)
    share = (num_tiles + programs - 1) // programs
    tile = tl.program_id(1) * share
    end = tl.minimum(tile + share, num_tiles)
    if tile >= end:
        return
    if query_scale_ptr is not None:
        scale *= tl.load(query_scale_ptr + kv_head * query_scale_stride)
    if key_scale_ptr is not None:
        scale *= tl.load(key_scale_ptr + kv_head * key_scale_stride)
    weight = decode_weight.to(tl.float32)
    aged = 1.0
    if DECAY:
        aged = tl.exp2(log2_decay * weight)
    while tile < end:
        passed = until <= tile
        before = tl.sum(tl.where(passed, tiles, 0))
        owner = first_row + tl.sum(passed.to(tl.int32))
        seq_len = tl.load(lens_ptr + owner)
        stop = tl.minimum(end - before, (seq_len + N - 1) // N)
        # A window of this one query forgets what was before.
        own = tl.load(flags_ptr + owner) >> _WINDOW_SHIFT
        older = tl.where(own == 1, 0.0, aged)
        queries, lse, _ = _query_rows(
            0,
            GROUP,
            query_ptr,
            lse_ptr,
            query_token_stride,
            query_head_stride,
            lse_head_stride,
            tl.load(query_start_ptr + owner),
            1,
            kv_head * GROUP,
            GROUP,
            HEAD_SIZE,
            HEAD_PADDED,
            M,
        )
        row_table_ptr = table_ptr + owner * table_stride
        for start in range((tile - before) * N, stop * N, N):
            keys, ids, place = _keys(
                start,
                seq_len,
                cache_ptr + kv_head * cache_head_stride,
                row_table_ptr,
                cache_block_stride,
                cache_token_stride,
                HEAD_SIZE,
                HEAD_PADDED,
                BLOCK_SIZE,
                N,
            )
            # Asked for before the product, so that it comes meanwhile.
            mass, peak, score = _known(
                start,
                seq_len,
                ids,
                kv_head,
                mass_ptr,
                peak_ptr,
                scores_block_stride,
                BLOCK_SIZE,
                N,
                BY_TOKEN,
                PEAK,
            )
            p = _probabilities(keys, queries, lse, scale, soft_cap, SOFT_CAP)
            p = tl.where((place < seq_len)[:, None], p, 0.0)
            _store(
                mass * older + tl.sum(p, 1) * weight,
                tl.maximum(peak, tl.max(p, 1)),
                score,
                start,
                seq_len,
                mass_ptr,
                peak_ptr,
                row_table_ptr,
                BLOCK_SIZE,
                N,
                BY_TOKEN,
                PEAK,
            )
        tile = before + stop


@triton.jit(
    do_not_specialize=[
        "first_row",
        "window",
        "decode_weight",
        "skip",
        "stride",
        "lse_head_stride",
        "query_scale_stride",
        "key_scale_stride",
    ]
)
def _chunk_mass_kernel(
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
    first_row,
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
    SOFT_CAP: tl.constexpr,
    DECAY: tl.constexpr,
    FLAG: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    PEAK: tl.constexpr,
):
    row = first_row + tl.program_id(2)
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
    weight = tl.where(num_queries == 1, decode_weight, stride).to(tl.float32)
    older = 1.0
    if DECAY:
        elapsed = tl.where(num_queries == 1, decode_weight, num_queries).to(tl.float32)
        older = tl.exp2(log2_decay * elapsed)
    if BY_TOKEN:
        # A request's own window takes the place of the server's, and is scored in full.
        own = flags >> _WINDOW_SHIFT
        if skip > 0 and own > 0:
            return
        last = tl.minimum(num_queries, tl.where(own > 0, own, window))
        older = tl.where((own > 0) & (num_queries >= own), 0.0, older)
    # Places of the queries that are scored, among the live tokens.
    first_place = seq_len - last
    first_place += (stride - first_place % stride) % stride
    end_place = seq_len - skip
    if first_place >= end_place or first_key >= end_place:
        return
    num_rows = (end_place - first_place + stride - 1) // stride * GROUP
    first_token = query_start + num_queries - seq_len + first_place
    first_head = kv_head * GROUP
    if query_scale_ptr is not None:
        scale *= tl.load(query_scale_ptr + kv_head * query_scale_stride)
    if key_scale_ptr is not None:
        scale *= tl.load(key_scale_ptr + kv_head * key_scale_stride)
    table_ptr += row * table_stride
    # It runs once: every tile has a program. Without the loop the compiled kernel is slower.
    for start in range(first_key, seq_len, tl.num_programs(1) * N):
        keys, ids, place = _keys(
            start,
            seq_len,
            cache_ptr + kv_head * cache_head_stride,
            table_ptr,
            cache_block_stride,
            cache_token_stride,
            HEAD_SIZE,
            HEAD_PADDED,
            BLOCK_SIZE,
            N,
        )
        total = tl.zeros([N], tl.float32)
        highest = tl.zeros([N], tl.float32)
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
        mass, peak, score = _known(
            start,
            seq_len,
            ids,
            kv_head,
            mass_ptr,
            peak_ptr,
            scores_block_stride,
            BLOCK_SIZE,
            N,
            BY_TOKEN,
            PEAK,
        )
        _store(
            mass * older + total * weight,
            tl.maximum(peak, highest),
            score,
            start,
            seq_len,
            mass_ptr,
            peak_ptr,
            table_ptr,
            BLOCK_SIZE,
            N,
            BY_TOKEN,
            PEAK,
        )
