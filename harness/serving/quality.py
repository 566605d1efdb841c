"""Perplexity under load: from the answers of quality requests. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..perplexity import after_eviction, by_chunk, first_affected, perplexity, total
from .plan import QUALITY
from .result import SUCCEEDED, Result

_EVICTION_KEY = "kv_eviction"


def quality_record(
    results: Sequence[Result], windows: Sequence[tuple[int, list[int]]], chunk: int
) -> dict[str, Any] | None:
    """What a load record says about quality; None where no request asked for it.

    A window counts only if the server evicted under the chunk that was asked for: its number of
    steps, in the answer's own eviction record, must be that of the chunk, without preemption
    (vLLM gives a request that is alone in the engine its whole token budget as its chunk, and
    cuts a chunk short where the budget of a step is used up). The others are kept, marked by
    ``other_chunk``, and are in no perplexity. A server without eviction sends no such record;
    there the chunk changes nothing and every window counts.
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
        rows.append(
            {
                "window": result.window,
                "start": start,
                "sent_s": round(result.sent or 0.0, 4),
                "other_chunk": not _kept_to(chunk, len(tokens), eviction),
                "eviction": eviction,
                **by_chunk(log_likelihoods(result.answer or {}, tokens), chunk),
            }
        )
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


def _kept_to(chunk: int, num_tokens: int, eviction: dict[str, Any]) -> bool:
    if "num_steps" not in eviction:
        return True
    return eviction["num_steps"] == -(-num_tokens // chunk) and not eviction["preemptions"]
