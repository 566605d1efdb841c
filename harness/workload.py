"""Which tokens a run sees: from a text and a seed, no clock."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .errors import UsageError


def draw_windows(
    tokens: Sequence[int], num_samples: int, context_length: int, seed: int
) -> list[tuple[int, list[int]]]:
    """Windows at random places, without overlap.

    Args:
        tokens: the whole text.
        num_samples: windows to draw.
        context_length: tokens per window.
        seed: of the draw; the same seed gives the same windows everywhere.

    Returns:
        ``num_samples`` pairs of (first token's index, tokens), in order of place.

    Raises:
        UsageError: the text is too short.

    """
    needed = num_samples * context_length
    if num_samples < 1 or context_length < 2:
        raise UsageError("--num-samples must be at least 1 and --context-length at least 2")
    if len(tokens) < needed:
        raise UsageError(
            f"the text has {len(tokens):,} tokens, but {num_samples} windows of "
            f"{context_length:,} need {needed:,}; lower --num-samples or --context-length"
        )
    rng = np.random.default_rng(seed)
    gaps = np.sort(rng.integers(0, len(tokens) - needed + 1, size=num_samples))
    starts = (gaps + np.arange(num_samples) * context_length).tolist()
    return [(start, list(tokens[start : start + context_length])) for start in starts]
