"""Null blocks out of the block table, so that attention reads live blocks only."""

from __future__ import annotations

from typing import Any

import torch

NULL_BLOCK = 0
"""vLLM's null block has id 0 (``vllm/v1/core/block_pool.py``)."""


def compact(
    block_table: torch.Tensor, seq_lens: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Drop null entries, keep the order of the rest, shorten the lengths accordingly.

        table  7 0 0 9 4 | 2      block_size 32, seq_len 185 (the last block holds 25 tokens)
        ->     7 9 4 2            seq_len 121

    Only full blocks are ever evicted, so a dropped entry always stands for ``block_size``
    tokens. Keys carry their rotary position, so moving a block changes nothing but its index.

    Args:
        block_table: int ``[num_requests, max_blocks]``; entries past a request's last block
            are arbitrary.
        seq_lens: int ``[num_requests]``, tokens.
        block_size: tokens per block.

    Returns:
        New table and lengths, or None where there is nothing to drop (the caller then passes
        vLLM's own tensors on, untouched).

    """
    num_blocks = (seq_lens + block_size - 1).div(block_size, rounding_mode="floor")
    column = torch.arange(block_table.shape[1], device=block_table.device)
    valid = column[None, :] < num_blocks[:, None]
    live = valid & (block_table != NULL_BLOCK)
    dropped = valid.sum(1) - live.sum(1)
    if not bool(dropped.any()):
        return None
    order = torch.argsort((~live).to(torch.int8), dim=1, stable=True)
    return (
        block_table.gather(1, order).contiguous(),
        (seq_lens - dropped * block_size).to(seq_lens.dtype),
    )


def compact_metadata(metadata: Any, block_size: int) -> Any:
    """``CommonAttentionMetadata`` with table and lengths compacted."""
    compacted = compact(metadata.block_table_tensor, metadata.seq_lens, block_size)
    if compacted is None:
        return metadata
    table, seq_lens = compacted
    # max_seq_len stays as it is: vLLM documents it as an upper bound.
    return metadata.replace(block_table_tensor=table, seq_lens=seq_lens)
