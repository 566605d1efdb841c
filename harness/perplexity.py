"""Perplexity under eviction, from per-token log-likelihoods. Pure NumPy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def perplexity(log_likelihoods: Sequence[Sequence[float]]) -> float:
    """``exp`` of the mean negative log-likelihood over all tokens of all windows.

    Raises:
        ValueError: no token at all.

    """
    tokens = np.concatenate([np.asarray(window, dtype=np.float64) for window in log_likelihoods])
    if len(tokens) == 0:
        raise ValueError("perplexity of no tokens")
    return math.exp(-tokens.mean())


def after_eviction(
    log_likelihoods: Sequence[float], first_eviction_tokens: int | None
) -> list[float]:
    """The log-likelihoods that eviction can have changed.

    Entry ``i`` belongs to token ``i + 1``, predicted by the query at token ``i``. With
    ``first_eviction_tokens`` tokens processed when the first block went, the queries from that
    index on no longer saw everything. Empty where nothing was evicted.
    """
    if first_eviction_tokens is None:
        return []
    return list(log_likelihoods[first_eviction_tokens:])
