"""Perplexity under eviction, from log-likelihoods summed by chunk. Pure: no clock, no engine.

A window's predictions are kept as one sum per chunk of queries. Eviction happens between chunks,
so nothing is lost: predictions before and after any eviction never share a sum, and a record
stays small enough to be committed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

Total = tuple[float, int]
"""Sum of log-likelihoods (nats) and the number of predictions it is over."""


def by_chunk(log_likelihoods: Sequence[float], chunk: int, min_context: int = 1) -> dict[str, Any]:
    """What a record keeps of one window.

    Args:
        log_likelihoods: entry ``i`` belongs to token ``i + 1``, predicted by the query at
            token ``i``.
        chunk: queries per sum.
        min_context: first token that is scored; predictions of earlier ones are in no sum.

    """
    first = min_context - 1
    sums = [
        # Rounded before anything is computed of them: a record's figures follow from the record.
        round(math.fsum(log_likelihoods[max(start, first) : start + chunk]), 4)
        for start in range(0, len(log_likelihoods), chunk)
    ]
    window = {
        "log_likelihoods": sums,
        "num_predictions": len(log_likelihoods),
        "predictions_per_entry": chunk,
    }
    return {**window, "num_unscored": first} if first else window


def total(window: Mapping[str, Any], start: int = 0) -> Total:
    """Sum and number of the scored predictions made by the queries from index ``start`` on.

    With ``start`` tokens processed when the first block went, these are the predictions that
    eviction can have changed.

    Raises:
        ValueError: ``start`` lies inside a chunk.

    """
    chunk = window["predictions_per_entry"]
    if start % chunk:
        raise ValueError(f"query {start} lies inside a sum over {chunk} predictions")
    sums = window["log_likelihoods"][start // chunk :]
    first = max(start, window.get("num_unscored", 0))
    return math.fsum(sums), max(0, window["num_predictions"] - first)


def first_affected(window: Mapping[str, Any]) -> int | None:
    """First query, rounded up to a whole sum, that can have missed an evicted block."""
    start = window["eviction"]["first_eviction_tokens"]
    chunk = window["predictions_per_entry"]
    return None if start is None else -(-start // chunk) * chunk


def last_quarter(window: Mapping[str, Any]) -> int | None:
    """First query of a window's last quarter; None where that lies inside a sum."""
    start = (window["num_predictions"] + 1) * 3 // 4
    return None if start % window["predictions_per_entry"] else start


def counts(window: Mapping[str, Any]) -> list[int]:
    """Scored predictions behind each sum of a window."""
    chunk, end = window["predictions_per_entry"], window["num_predictions"]
    first = window.get("num_unscored", 0)
    starts = range(0, end, chunk)
    return [max(0, min(start + chunk, end) - max(start, first)) for start in starts]


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
    sums, sizes = zip(*totals, strict=True) if (totals := list(totals)) else ((), ())
    if sum(sizes) == 0:
        raise ValueError("perplexity of no predictions")
    return math.exp(-math.fsum(sums) / sum(sizes))


def normalised(windows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Measures that do not depend on the tokenizer, over the scored text of all windows.

    ``word_perplexity`` and ``byte_perplexity`` as in EleutherAI's lm-evaluation-harness, and
    ``bits_per_byte``. ``word_perplexity`` is None where no number can hold it: text without
    white space.

    Raises:
        ValueError: the scored text is empty.

    """
    nats = -math.fsum(total(window)[0] for window in windows)
    words = sum(window["scored_words"] for window in windows)
    size = sum(window["scored_bytes"] for window in windows)
    if not words or not size:
        raise ValueError("perplexity of no words")
    return {
        "word_perplexity": math.exp(nats / words) if nats / words < 700 else None,
        "byte_perplexity": math.exp(nats / size),
        "bits_per_byte": nats / size / math.log(2),
    }


def mean_perplexity(records: Iterable[Mapping[str, Any]]) -> float:
    """Mean over runs of the perplexity over a run's windows."""
    return fmean(perplexity(map(total, record["windows"])) for record in records)
