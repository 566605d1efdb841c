"""What became of one request: raw times, no statistic."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SUCCEEDED = "succeeded"
FAILED = "failed"
TIMED_OUT = "timed_out"
INCOMPLETE = "incomplete"
NOT_SENT = "not_sent"
STATUSES = (SUCCEEDED, FAILED, TIMED_OUT, INCOMPLETE, NOT_SENT)


@dataclass(slots=True)
class Result:
    """Times are seconds from the start of the run, None where it did not come to that.

    ``chunks`` are the arrivals of streamed chunks with tokens (vLLM sends one a step, usually of
    one token). ``output_tokens`` is the server's own count, its ``usage``; None where an answer
    came to its end without one. Of an answer that broke off it is the number of chunks, which are
    no more than the tokens in them.
    """

    index: int
    kind: str
    intended: float | None
    status: str = NOT_SENT
    sent: float | None = None
    end: float | None = None
    chunks: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int | None = 0
    counted_by_chunks: bool = False
    """The answer broke off before the server's count, which comes last."""
    error: str | None = None
    """Kind of failure, like ``http_500`` or ``connection_closed``."""
    message: str | None = None
    window: int | None = None
    answer: dict[str, Any] | None = None
    """The parsed answer of a quality request."""

    def start(self, open_loop: bool) -> float:
        """Where latency counts from: the intended time in an open loop, else the sending."""
        start = self.intended if open_loop else self.sent
        assert start is not None
        return start
