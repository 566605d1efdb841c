"""Triton kernels of the CUDA backend. Their references in plain torch are
``attention/compaction.py``, ``block_mass.py``, ``token_mass.py`` and ``token_choice.py``, which the
CPU backend runs.

Scores of blocks are fixed-point integers on the GPU. Several programs add to the same block, in an
order that changes from run to run; integer addition does not care, so the same batch gives the same
scores, and the same victims, every time. Floating-point atomics would not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FRACTION_BITS = 30
"""A score of 1.0 is ``2 ** FRACTION_BITS``. A block holds at most heads * layers * queries of
mass, so int64 leaves room for 2 ** 33: 128 heads, 128 layers and half a million queries that
look at nothing else."""

NEEDED, SCORED, TOKENS_NEEDED, TOKENS_SCORED = 1, 2, 4, 8
"""Bits of a row's flag: its request wants scores of blocks, and in this step; the same for scores
of tokens."""
WINDOW_SHIFT = 4
"""The bits above these hold the window of a request whose rule has one (``TokenRule.window``)."""


def scale_stride(scale: torch.Tensor | None) -> int:
    """From one KV head's scale to the next: 0 where a layer has one for all, or none."""
    return 0 if scale is None or scale.numel() == 1 else 1
