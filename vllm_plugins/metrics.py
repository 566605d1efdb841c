"""Counters of a whole engine, through vLLM's own statistics and Prometheus export."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

COUNTERS = {
    "blocks_evicted": "KV blocks evicted and returned to the pool.",
    "decisions": "Eviction decisions taken (one request, one layer group).",
    "decision_seconds": "Seconds the scheduler spent deciding.",
    "refused_settings": "Requests whose own settings were wrong and replaced by the server's.",
    "policy_errors": "Requests whose policy failed, so that nothing more was evicted.",
}
ENDED: dict[str, tuple[str, tuple[float, ...]]] = {
    "peak_blocks": (
        "Most KV blocks that a request held in a step, by layer group, of requests that ended.",
        tuple(2.0**n for n in range(15)),
    ),
    "effective_sparsity": (
        "Share of its blocks that a request's budget let go at its end; 0: nothing was evicted.",
        (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 1.0),
    ),
}
"""By key of a request's record: what its histogram tells, and the upper bounds of buckets."""
LIVE_SHARE = "live_share"
LABELLED = {
    "requests": ("policy", "Requests by the policy they follow."),
    "scoring_seconds": ("phase", "Seconds workers spent on scores and packing (CPU only)."),
}
"""Counters with a label of their own."""


@dataclass
class EvictionStats(KVConnectorStats):
    """``data``: ``COUNTERS`` as increments, those of ``LABELLED`` by label, ``ENDED`` as values of
    the requests that ended, ``live_share`` now (None: of nothing)."""

    def is_empty(self) -> bool:
        return not self.data

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> EvictionStats:
        for name in COUNTERS:
            self.data[name] = self.data.get(name, 0) + other.data.get(name, 0)
        for name in LABELLED:
            sums = dict(self.data.get(name, {}))
            for label, count in other.data.get(name, {}).items():
                sums[label] = sums.get(label, 0) + count
            self.data[name] = sums
        for name in ENDED:
            self.data[name] = [*self.data.get(name, ()), *other.data.get(name, ())]
        if LIVE_SHARE in other.data:
            self.data[LIVE_SHARE] = other.data[LIVE_SHARE]
        return self

    def reduce(self) -> dict[str, int | float]:
        """For the log of an interval, by name.

        vLLM puts "KV Transfer metrics: " before whatever a connector has to say, and nothing is
        transferred here. The first name, the only words of the line that are ours, says so.
        """
        shown = {name: round(self.data.get(name, 0), 4) for name in COUNTERS}
        for name in LABELLED:
            for label, count in self.data.get(name, {}).items():
                shown[f"{name}_{label}"] = round(count, 4)
        for name in ENDED:
            if values := self.data.get(name):
                shown[f"mean_{name}"] = round(sum(values) / len(values), 4)
        if (share := self.data.get(LIVE_SHARE)) is not None:
            shown[LIVE_SHARE] = round(share, 4)
        first, *_ = shown
        return {f"KV eviction: {first}": shown.pop(first), **shown}


class EvictionPromMetrics(KVConnectorPromMetrics):
    """``vllm:kv_eviction_*`` on ``/metrics``."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[type, type],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: metric_types[Counter](
                name=f"vllm:kv_eviction_{name}", documentation=text, labelnames=labelnames
            )
            for name, text in COUNTERS.items()
        }
        self._ended = {
            name: metric_types[Histogram](
                name=f"vllm:kv_eviction_{name}",
                documentation=text,
                buckets=buckets,
                labelnames=labelnames,
            )
            for name, (text, buckets) in ENDED.items()
        }
        self._live_share = metric_types[Gauge](
            name="vllm:kv_eviction_live_share",
            documentation="Share still held of the full blocks of running requests that evict; "
            "NaN while there are none.",
            labelnames=labelnames,
            multiprocess_mode="mostrecent",
        )
        self._labelled = {
            name: metric_types[Counter](
                name=f"vllm:kv_eviction_{name}",
                documentation=text,
                labelnames=[*labelnames, label],
            )
            for name, (label, text) in LABELLED.items()
        }
        # There from the start: rate() cannot see the increment that creates a series.
        for labels in per_engine_labelvalues.values():
            for metric in (*self._counters.values(), *self._ended.values()):
                metric.labels(*labels)
            self._live_share.labels(*labels).set(math.nan)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add one step's ``EvictionStats.data``."""
        labels = self.per_engine_labelvalues[engine_idx]
        for name, counter in self._counters.items():
            counter.labels(*labels).inc(transfer_stats_data.get(name, 0))
        for name, histogram in self._ended.items():
            for ended in transfer_stats_data.get(name, ()):
                histogram.labels(*labels).observe(ended)
        if LIVE_SHARE in transfer_stats_data:
            share = transfer_stats_data[LIVE_SHARE]
            self._live_share.labels(*labels).set(math.nan if share is None else share)
        for name, counter in self._labelled.items():
            for label, count in transfer_stats_data.get(name, {}).items():
                counter.labels(*labels, label).inc(count)
