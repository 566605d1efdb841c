"""Perplexity under load: from the answers of quality requests. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..client.answer import log_likelihoods
from ..client.load_plan import QUALITY
from ..client.result import SUCCEEDED, Result
from .perplexity import Total, after_eviction, by_chunk, first_affected, perplexity, total

_EVICTION_KEY = "kv_eviction"
_LEAST, _MOST = -1e6, 1e-3
"""Of a log-prob: vLLM's own least is -9999, and rounding may lift a certain token's above 0."""


def quality_record(
    results: Sequence[Result], windows: Sequence[tuple[int, list[int]]], chunk: int
) -> dict[str, Any] | None:
    """What a load record says about quality; None where no request asked for it.

    Windows under another chunk than was asked for (``kept_to_chunk``) are kept, marked by
    ``other_chunk``, and are in no perplexity. Answers that hold no numbers to take one from are in
    ``unusable``, each with its reason. A perplexity that no float can hold is None.
    """
    asked = [r for r in results if r.kind == QUALITY]
    if not asked:
        return None
    rows, unusable = [], []
    for result in asked:
        if result.status != SUCCEEDED:
            continue
        assert result.window is not None
        assert result.answer is not None
        start, tokens = windows[result.window]
        row: dict[str, Any] = {
            "window": result.window,
            "start": start,
            "sent_s": round(result.sent or 0.0, 4),
        }
        try:
            row["eviction"] = _eviction(result.answer)
            row |= by_chunk(_checked(log_likelihoods(result.answer, tokens)), chunk)
        except ValueError as error:
            unusable.append({**row, "reason": str(error)})
            continue
        rows.append({**row, "other_chunk": not kept_to_chunk(row)})
    counted = [row for row in rows if not row["other_chunk"]]
    return {
        "num_asked": len(asked),
        "num_answered": len(rows) + len(unusable),
        "num_unusable": len(unusable),
        "num_other_chunk": len(rows) - len(counted),
        "perplexity": perplexity_or_none(map(total, counted)),
        "perplexity_after_eviction": perplexity_or_none(
            after_eviction(counted, map(first_affected, counted))
        ),
        "windows": rows,
        "unusable": unusable,
    }


def perplexity_or_none(totals: Iterable[Total]) -> float | None:
    """``perplexity``; None of no prediction, and where no float can hold it."""
    totals = list(totals)
    try:
        return perplexity(totals) if totals else None
    except OverflowError:
        return None


def _checked(log_probs: list[float]) -> list[float]:
    """Log-probs, each of which a model can give.

    Raises:
        ValueError: which one is none.

    """
    for place, value in enumerate(log_probs, start=1):
        if not _LEAST < value < _MOST:
            raise ValueError(f"{value:g} is no log-prob of a token (token {place} of the window)")
    return log_probs


def _eviction(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """The plugin's record of what was evicted; of a server without it, that nothing is known.

    Raises:
        ValueError: it holds something else than counts.

    """
    parameters = answer.get("kv_transfer_params")
    if not isinstance(parameters, Mapping) or not parameters.get(_EVICTION_KEY):
        return {"first_eviction_tokens": None}
    eviction = parameters[_EVICTION_KEY]
    try:
        json.dumps(eviction, allow_nan=False)
        first = eviction["first_eviction_tokens"]
        counts = [] if first is None else [first]
        if _evicts(eviction):
            counts += [eviction[name] for name in ("blocks_evicted", "num_steps", "preemptions")]
        if all(type(n) is int and n >= 0 for n in counts):
            return eviction
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    raise ValueError("the answer's eviction record does not hold the plugin's counts")


def kept_to_chunk(row: Mapping[str, Any]) -> bool:
    """Whether a window was computed under the chunk that its sums are over.

    Its number of steps, from the answer's own eviction record, must be that of the chunk, without
    preemption: vLLM gives a request that is alone in the engine its whole token budget as its
    chunk, cuts a chunk short where the budget of a step is used up, and computes a preempted
    prompt anew. A prompt is evicted from between its chunks: one that a server computed in a
    single step has the dense model's perplexity, whatever sparsity was asked for. Where none was
    (dense, or a server without the plugin, which sends no such record) the chunk changes nothing.
    """
    eviction = row["eviction"]
    if not _evicts(eviction):
        return True
    steps = -(-(row["num_predictions"] + 1) // row["predictions_per_entry"])
    return eviction["num_steps"] == steps and not eviction["preemptions"]


def _evicts(eviction: Mapping[str, Any]) -> bool:
    return any(eviction.get(name) for name in ("blocks_evicted", "sparsity", "budget_tokens"))
