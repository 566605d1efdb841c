"""Attention mass per block, summed over heads: scores at block granularity."""

from __future__ import annotations

from typing import Any

import torch

from . import SCORED
from .attention_mass import Queries, launch


def add_block_mass(queries: Queries, mass: torch.Tensor, **options: Any) -> None:
    """Add the attention probability mass of this step's queries to ``mass``, by block.

    Column sums of ``p = exp(q k^T scale - lse)`` need no output matrix: memory is O(1) beside
    ``mass``.

    Args:
        queries: of the step; rows without the flag ``SCORED`` are skipped.
        mass: int64 ``[num_blocks]``, fixed point.
        options: as ``attention_mass.launch``.

    Cost. Decode: keys once, ``2 * head_size`` bytes per live token and KV head, i.e. half of what
    attention reads, and ``2 * head_size`` FLOPs per token and query head. Chunk: the causal half
    of ``Q K^T``, half of FlashAttention's FLOPs, and as many exponentials.

    On an H100 (results/kernels-gpu.json) decode reads at 91% of a copy's bandwidth with 128 rows of
    4,096 tokens, at 57% with 96 of 448. All queries of a chunk take 0.83 to 0.95 of
    FlashAttention's time.

    """
    launch(queries, SCORED, mass, None, by_token=False, **options)
