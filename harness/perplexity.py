"""Perplexity under eviction, from log-likelihoods summed by chunk. Pure Python.

A window's predictions are kept as one sum per chunk of queries. Eviction happens between chunks,
so nothing is lost: predictions before and after any eviction never share a sum, and a record
stays small enough to be committed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Total = tuple[float, int]
"""Sum of log-likelihoods (nats) and the number of predictions it is over."""


def by_chunk(log_likelihoods: Sequence[float], chunk: int) -> dict[str, Any]:
    """What a record keeps of one window.

    Args:
        log_likelihoods: entry ``i`` belongs to token ``i + 1``, predicted by the query at
            token ``i``.
        chunk: queries per sum.

    """
    sums = [
        # Rounded before anything is computed of them: a record's figures follow from the record.
        round(math.fsum(log_likelihoods[start : start + chunk]), 4)
        for start in range(0, len(log_likelihoods), chunk)
    ]
    return {
        "log_likelihoods": sums,
        "num_predictions": len(log_likelihoods),
        "predictions_per_entry": chunk,
    }


def total(window: Mapping[str, Any], start: int = 0) -> Total:
    """Sum and number of the predictions made by the queries from index ``start`` on.

    With ``start`` tokens processed when the first block went, these are the predictions that
    eviction can have changed.

    Raises:
        ValueError: ``start`` lies inside a chunk.

    """
    chunk = window["predictions_per_entry"]
    if start % chunk:
        raise ValueError(f"query {start} lies inside a sum over {chunk} predictions")
    sums = window["log_likelihoods"][start // chunk :]
    return math.fsum(sums), max(0, window["num_predictions"] - start)


def after_eviction(
    windows: Iterable[Mapping[str, Any]], starts: Iterable[int | None]
) -> list[Total]:
    """``total`` of each window from its start on; windows without eviction, or without a
    prediction after it, are left out."""
    totals = [total(w, s) for w, s in zip(windows, starts, strict=True) if s is not None]
    return [entry for entry in totals if entry[1] > 0]


def perplexity(totals: Iterable[Total]) -> float:
    """``exp`` of the mean negative log-likelihood over all predictions.

    Raises:
        ValueError: no prediction at all.

    """
    sums, counts = zip(*totals, strict=True) if (totals := list(totals)) else ((), ())
    if sum(counts) == 0:
        raise ValueError("perplexity of no predictions")
    return math.exp(-math.fsum(sums) / sum(counts))
