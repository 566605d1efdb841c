"""What an engine gives back, and what makes it no result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


class UnfaithfulRun(RuntimeError):
    """The engine is well, but what it did is not what the specification says."""


class NotFinite(RuntimeError):
    """A log-prob is NaN or infinite. What made it so may lie in the KV cache still."""


@dataclass(frozen=True)
class ScoredWindow:
    """One window as the engine saw it.

    ``log_likelihoods``: natural log of the probability of tokens 1 .. n-1, float ``[n - 1]``.
    ``record``: the plugin's counters for the request.
    """

    log_likelihoods: list[float]
    record: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """One request as the engine answered it.

    ``token_ids``: of the answer, the end-of-sequence token included. ``ended``: that token ended
    it. ``record``: the plugin's counters for the request. ``cached_tokens``: of the prompt, found
    in the prefix cache.
    """

    token_ids: list[int]
    text: str
    ended: bool
    record: dict[str, Any]
    cached_tokens: int = 0


@dataclass
class Scored:
    """A run's windows, the seconds they took, and the pool while the first ones ran.

    ``trace``: ``tokens`` processed per window, and KV ``blocks`` held per window, after each
    step of the first windows in flight; at most ``MAX_TRACE_POINTS`` points.
    """

    windows: list[ScoredWindow] = field(default_factory=list)
    seconds: float = 0.0
    trace: dict[str, list[float]] = field(default_factory=dict)
