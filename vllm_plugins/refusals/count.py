"""Counts refused requests where they are refused: in the front end, of which no engine knows."""

from __future__ import annotations

from functools import cache

from prometheus_client import REGISTRY, Counter

_NAME = "vllm:kv_eviction_refused_requests"


def refused_requests() -> Counter:
    """The counter, on ``/metrics`` from the first call on.

    Each engine's start drops every ``vllm:`` metric that is older (``unregister_vllm_metrics`` in
    ``vllm/v1/metrics/prometheus.py``), so it is put back where it is missing. It has no labels, as
    the front end does not know the model's name where it refuses. With several API servers each
    writes a file of its own, and vLLM's ``/metrics`` adds them up.
    """
    counter = _counter()
    if REGISTRY.get_sample_value(f"{_NAME}_total") is None:
        REGISTRY.register(counter)
    return counter


@cache
def _counter() -> Counter:
    return Counter(
        _NAME,
        "Requests refused (HTTP 400) for their eviction settings; each prompt of a list counts.",
    )
