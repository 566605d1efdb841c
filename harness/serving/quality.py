"""Perplexity under load: from the answers of quality requests. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..perplexity import after_eviction, by_chunk, first_affected, perplexity, total
from .plan import QUALITY
from .result import SUCCEEDED, Result

_EVICTION_KEY = "kv_eviction"


def quality_record(
    results: Sequence[Result], windows: Sequence[tuple[int, list[int]]], chunk: int
) -> dict[str, Any] | None:
    """What a load record says about quality; None where no request asked for it.

    Windows under another chunk than was asked for (``kept_to_chunk``) are kept, marked by
    ``other_chunk``, and are in no perplexity.
    """
    asked = [r for r in results if r.kind == QUALITY]
    if not asked:
        return None
    rows = []
    for result in asked:
        if result.status != SUCCEEDED:
            continue
        assert result.window is not None
        start, tokens = windows[result.window]
        eviction = (result.answer or {}).get("kv_transfer_params") or {}
        eviction = eviction.get(_EVICTION_KEY) or {"first_eviction_tokens": None}
        row = {
            "window": result.window,
            "start": start,
            "sent_s": round(result.sent or 0.0, 4),
            "eviction": eviction,
            **by_chunk(log_likelihoods(result.answer or {}, tokens), chunk),
        }
        rows.append({**row, "other_chunk": not kept_to_chunk(row)})
    counted = [row for row in rows if not row["other_chunk"]]
    evicted = after_eviction(counted, map(first_affected, counted))
    return {
        "num_asked": len(asked),
        "num_answered": len(rows),
        "num_other_chunk": len(rows) - len(counted),
        "perplexity": perplexity(map(total, counted)) if counted else None,
        "perplexity_after_eviction": perplexity(evicted) if evicted else None,
        "windows": rows,
    }


def log_likelihoods(answer: dict[str, Any], tokens: Sequence[int]) -> list[float]:
    """Natural log of the probability of tokens 1 .. n-1, from a completion's prompt log-probs.

    Raises:
        ValueError: the answer has none, or they are of another prompt.

    """
    entries = answer["choices"][0].get("prompt_logprobs")
    if entries is None or len(entries) != len(tokens):
        raise ValueError("the server's answer holds no log-probs of this prompt")
    return [
        float(entry[str(token)]["logprob"])
        for token, entry in zip(tokens[1:], entries[1:], strict=True)
    ]


def kept_to_chunk(row: Mapping[str, Any]) -> bool:
    """Whether a window was evicted from under the chunk that its sums are over.

    Its number of steps, from the answer's own eviction record, must be that of the chunk, without
    preemption: vLLM gives a request that is alone in the engine its whole token budget as its
    chunk, cuts a chunk short where the budget of a step is used up, and computes a preempted
    prompt anew. Where nothing was evicted (dense, or a server without the plugin, which sends no
    such record) the chunk changes nothing.
    """
    eviction = row["eviction"]
    if not eviction.get("blocks_evicted"):
        return True
    steps = -(-(row["num_predictions"] + 1) // row["predictions_per_entry"])
    return eviction["num_steps"] == steps and not eviction["preemptions"]
