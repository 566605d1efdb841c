"""Counts refused requests where they are refused: in the front end, of which no engine knows."""

from __future__ import annotations

from functools import cache

from prometheus_client import Counter


@cache
def refused_requests() -> Counter:
    """The counter, on ``/metrics`` from the first call on.

    Not made when this module is imported: vLLM drops every ``vllm:`` metric that is older than its
    own (``unregister_vllm_metrics`` in ``vllm/v1/metrics/prometheus.py``). It has no labels, as the
    front end does not know the model's name where it refuses. With several API servers each
    writes a file of its own, and vLLM's ``/metrics`` adds them up.
    """
    return Counter(
        "vllm:kv_eviction_refused_requests",
        "Requests refused (HTTP 400) for their eviction settings; each prompt of a list counts.",
    )
