"""Attention mass by block or by token, from FlashAttention's log-sum-exp, in one pass over keys.

``block_mass.py`` and ``token_mass.py`` say what it is for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

from . import scale_stride
from .attention_mass_kernels import _chunk_mass_kernel, _decode_mass_kernel


@dataclass(frozen=True)
class Tile:
    """Shape of one program's work: query rows, keys, warps, pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


DECODE_ROWS = 64
"""So many decode rows are dealt out together."""

PROGRAMS = 1024
"""A decode's rows are split over about so many."""

# The fastest of sweeps on an H100 at heads of 128 (scripts/bench_kernels --sweep). A decode's
# program has so few tiles that a pipeline does not pay: its room is better used by more programs.
# Its rows are the query heads of a group.
DECODE = Tile(rows=16, keys=64, warps=2, stages=1)
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
    programs: int = PROGRAMS,
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
        one_query: no row of the range has more than one query (decode): each counts, whatever
            ``window``, ``skip`` and ``stride``.
        window: only so many last queries of a row count.
        decode_weight: a row with one query counts it so many times (``score_query_stride``).
        skip: the last so many queries of a row do not count, nor do rows with windows of their own;
            another launch scores them.
        stride: only the queries at places that it divides count, and each counts so many times. It
            divides the block size, so that it is the same ones before an eviction and after.
        log2_decay: log2 of the weight lost per token of age within the chunk; 0 = none. By token
            not together with ``skip``: scores would age in either launch.
        tile: shape of the work; by default ``DECODE``, ``CHUNK``, or ``WINDOW`` for few queries.
        programs: the tiles of decode rows are dealt out to about so many: which rows are scored is
            known when a graph is replayed, the number of programs when it is captured.

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
    num_tiles = triton.cdiv(max_seq_len, keys)
    tensors = (
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
    )
    scales_and_strides = (
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
    )
    options = {
        "GROUP": group,
        "HEAD_SIZE": head_size,
        "HEAD_PADDED": triton.next_power_of_2(head_size),
        "BLOCK_SIZE": block_size,
        "N": keys,
        "SOFT_CAP": queries.soft_cap > 0.0,
        "DECAY": log2_decay < 0.0,
        "FLAG": flag,
        "BY_TOKEN": by_token,
        "PEAK": peak is not None,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    if one_query:
        groups = triton.cdiv(stop - start, DECODE_ROWS)
        shares = min(num_tiles * (stop - start), triton.cdiv(programs, groups * num_kv_heads))
        _decode_mass_kernel[(num_kv_heads, shares, groups)](
            *tensors,
            start,
            stop,
            decode_weight,
            *scales_and_strides,
            M=max(16, triton.next_power_of_2(group)),
            ROWS=DECODE_ROWS,
            **options,
        )
        return
    _chunk_mass_kernel[(num_kv_heads, num_tiles, stop - start)](
        *tensors,
        start,
        window if window is not None else 2**30,
        decode_weight,
        skip,
        stride,
        *scales_and_strides,
        M=tile.rows,
        **options,
    )
