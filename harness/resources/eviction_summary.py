"""What was evicted over the requests of a load. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def summary(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """What was evicted over requests, of their records; None without the plugin."""
    if not any(records):
        return None
    return {
        "average_blocks": sum(r["average_blocks"] for r in records) / len(records),
        "effective_sparsity": sum(r["effective_sparsity"] for r in records) / len(records),
        "peak_blocks": max(r["peak_blocks"] for r in records),
        "blocks_evicted": sum(r["blocks_evicted"] for r in records),
        "decisions": sum(r["decisions"] for r in records),
        "decision_seconds": sum(r["decision_seconds"] for r in records),
        "policy_errors": sum("policy_error" in r for r in records),
    }
