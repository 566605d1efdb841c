"""What a server counted while lm-eval ran: the proof that a run saw eviction, or saw none."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from harness.client.scrape import parse_metrics
from harness.records.specifications import DENSE

OURS = "kv_eviction_"
_POLICY = f"{OURS}requests:"
_KEPT = ("prompt_tokens", "generation_tokens")
"""vLLM's own counters that a record keeps beside ours."""
_TRIES = 10


class NothingSeen(RuntimeError):
    """The counters do not say what the run was meant to see; the message says how."""


def counters(base_url: str, *, read: Callable[[str], str] | None = None) -> dict[str, float]:
    """The server's counters, once two readings agree: the last step's come a moment late.

    Args:
        base_url: of the server.
        read: gives the page of an address; None: over HTTP.

    """
    read = read or _read
    last: dict[str, float] = {}
    for _ in range(_TRIES):
        page = parse_metrics(read(f"{base_url}/metrics"))
        found = {name: n for name, n in page.items() if name.startswith(OURS) or name in _KEPT}
        found.pop(f"{OURS}live_share", None)  # a gauge: it has no increment
        if found == last:
            break
        last = found
        time.sleep(0.5)
    return last


def between(
    before: Mapping[str, float], after: Mapping[str, float], block_size: int
) -> dict[str, Any]:
    """Increments between two readings.

    Args:
        before: what ``counters`` gave.
        after: the same, later.
        block_size: tokens per block.

    Returns:
        ``blocks_evicted``, ``tokens_evicted`` (places in those blocks), ``decisions``,
        ``requests`` by policy, ``requests_ended`` with the means of their ``effective_sparsity``
        and ``peak_blocks`` (None where none ended), ``prompt_tokens``.

    """
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    ours = {name.removeprefix(OURS): value for name, value in grown.items()}
    ended = ours.get("effective_sparsity_count", 0)
    blocks = int(ours.get("blocks_evicted", 0))
    return {
        "blocks_evicted": blocks,
        "tokens_evicted": blocks * block_size,
        "decisions": int(ours.get("decisions", 0)),
        "requests": {
            name.removeprefix(_POLICY): int(value)
            for name, value in grown.items()
            if name.startswith(_POLICY) and value
        },
        "requests_ended": int(ended),
        **{
            f"mean_{name}": round(ours[f"{name}_sum"] / ended, 4) if ended else None
            for name in ("effective_sparsity", "peak_blocks")
        },
        "prompt_tokens": int(grown.get("prompt_tokens", 0)),
    }


def check(seen: Mapping[str, Any], method: str, num_requests: int) -> None:
    """Hold what was counted against what was asked.

    Raises:
        NothingSeen: a method that evicts evicted nothing, dense did, or not all requests followed
            the method and nobody else asked.

    """
    if method == DENSE and seen["blocks_evicted"]:
        raise NothingSeen(f"the server evicted {seen['blocks_evicted']} blocks under dense")
    if method != DENSE and not seen["blocks_evicted"]:
        raise NothingSeen(
            f"the server evicted nothing under {method}; raise --context-length, or lower "
            "--score-chunk"
        )
    if seen["requests"] != {method: num_requests}:
        raise NothingSeen(
            f"{num_requests} requests were to follow {method}, and the server counted "
            f"{seen['requests'] or 'none'}"
        )


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as page:
        return page.read().decode()
