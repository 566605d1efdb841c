"""What a server's answer says, and whether it is what was asked for. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from .result import FAILED, INCOMPLETE

MALFORMED = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)
"""What reading JSON of unknown shape can raise."""
_MOST_TOKENS = 2**40
"""A count above it is no count, and no float holds some of them."""
_decode = json.JSONDecoder().decode


class Chunk(NamedTuple):
    """One event of a stream."""

    has_choice: bool
    finish_reason: str | None
    usage: bool
    output_tokens: int | None
    prompt_tokens: int | None
    error: str | None


def take_chunk(event: bytes) -> Chunk:
    """Read the payload of one event.

    Raises:
        MALFORMED: one of these errors: it is no completion chunk.

    """
    chunk = _decode(event.decode())
    choices, usage, error = chunk.get("choices"), chunk.get("usage"), chunk.get("error")
    reason = choices[0].get("finish_reason") if choices else None
    prompt = usage.get("prompt_tokens") if usage else None
    return Chunk(
        has_choice=bool(choices),
        finish_reason=None if reason is None else str(reason),
        usage=bool(usage),
        output_tokens=count(usage["completion_tokens"]) if usage else None,
        prompt_tokens=None if prompt is None else count(prompt),
        error=error_message(event.decode()) if error else None,
    )


def count(value: Any) -> int:
    """A number of tokens.

    Raises:
        ValueError: not a whole number of at least 0.

    """
    if type(value) is not int or not 0 <= value < _MOST_TOKENS:
        raise ValueError(f"{value!r} is no number of tokens")
    return value


def shortcoming(
    finish_reason: str | None, tokens: int | None, asked: int
) -> tuple[str, str, str] | None:
    """Why an answer that came to its end is not what was asked for: status, error, message.

    Args:
        finish_reason: the server's; only ``length`` and ``stop`` end a whole answer.
        tokens: the server's count, None where it gave none: then their number is not judged.
        asked: tokens asked for, with ``ignore_eos``: no fewer and no more.

    Returns:
        None for a whole answer.

    """
    ended = f"finish_reason is {str(finish_reason)[:40]!r}"
    made = "" if tokens is None else f" after {tokens} of {asked} tokens"
    if finish_reason not in ("length", "stop"):
        word = str(finish_reason or "none")
        kind = word if word.isidentifier() and len(word) <= 40 else "other"
        return INCOMPLETE, f"finish_{kind}", f"the server gave up: {ended}{made}"
    if tokens is None or tokens == asked:
        return None
    if tokens > asked:
        return (
            FAILED,
            "too_many_tokens",
            f"the server made {tokens} tokens where {asked} were asked for: it does not follow "
            "max_tokens, or counts otherwise",
        )
    why = (
        "the server does not follow ignore_eos"
        if finish_reason == "stop"
        else "the server's own limit on output, or its max_model_len, is lower"
    )
    return INCOMPLETE, "too_few_tokens", f"{ended}{made}: {why}"


def error_message(text: str) -> str:
    """The sentence in an OpenAI error body, or the body."""
    try:
        body = json.loads(text)
        return str(body.get("error", body)["message"])
    except MALFORMED:
        return text or "no message"


def log_likelihoods(answer: dict[str, Any], tokens: Sequence[int]) -> list[float]:
    """Natural log of the probability of tokens 1 .. n-1, from a completion's prompt log-probs.

    Raises:
        ValueError: the answer has none, or they are of another prompt; so do the other errors that
            reading JSON of unknown shape raises (``answer.MALFORMED``).

    """
    entries = answer["choices"][0].get("prompt_logprobs")
    if entries is None or len(entries) != len(tokens):
        raise ValueError("the server's answer holds no log-probs of this prompt")
    return [
        float(entry[str(token)]["logprob"])
        for token, entry in zip(tokens[1:], entries[1:], strict=True)
    ]
