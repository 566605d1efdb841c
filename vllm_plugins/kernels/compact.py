"""Null blocks out of the block table, on the GPU, into buffers that live as long as a graph."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _compact_kernel(
    table_ptr,
    lens_ptr,
    out_table_ptr,
    out_lens_ptr,
    table_stride,
    out_stride,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0)
    seq_len = tl.load(lens_ptr + row)
    num_blocks = (seq_len + BLOCK_SIZE - 1) // BLOCK_SIZE
    num_live = 0
    for start in range(0, num_blocks, WIDTH):
        column = start + tl.arange(0, WIDTH)
        block = tl.load(table_ptr + row * table_stride + column, mask=column < num_blocks, other=0)
        live = (block != 0).to(tl.int32)
        place = num_live + tl.cumsum(live, 0) - 1
        tl.store(out_table_ptr + row * out_stride + place, block, mask=live != 0)
        num_live += tl.sum(live, 0)
    # Only full blocks are evicted. Warm-up rows have tables of nothing but nulls.
    length = seq_len - (num_blocks - num_live) * BLOCK_SIZE
    tl.store(out_lens_ptr + row, tl.maximum(length, 0))


def compact_block_table(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    block_size: int,
    out_table: torch.Tensor,
    out_lens: torch.Tensor,
) -> None:
    """Drop null entries, keep the order of the rest, shorten the lengths (``compaction.compact``).

    Args:
        block_table: int32 ``[num_rows, width]``; entries past a row's last block are arbitrary.
        seq_lens: int32 ``[num_rows]``, tokens; 0 for padding rows.
        block_size: tokens per block.
        out_table: int32 ``[num_rows, width]``; entries past a row's live blocks keep what they
            held, and no kernel reads them.
        out_lens: int32 ``[num_rows]``.

    Reads and writes 4 bytes per live table entry, reads 4 per null: 2 KiB a row of 4,096 tokens
    at block size 16. No FLOPs.

    """
    _compact_kernel[(len(seq_lens),)](
        block_table,
        seq_lens,
        out_table,
        out_lens,
        block_table.stride(0),
        out_table.stride(0),
        BLOCK_SIZE=block_size,
        WIDTH=256,
        num_warps=2,
    )
