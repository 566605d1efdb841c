"""The plugin's metrics, as a Prometheus server reads them and as vLLM logs them."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from vllm_plugins.metrics import COUNTERS, ENDED, EvictionPromMetrics, EvictionStats

LABELS = {"model_name": "m", "engine": "0"}


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def exported(registry):
    types = {kind: partial(kind, registry=registry) for kind in (Counter, Gauge, Histogram)}
    configuration = SimpleNamespace(kv_transfer_config=None)
    return EvictionPromMetrics(configuration, types, [*LABELS], {0: [*LABELS.values()]})


def value(registry, name, **labels):
    return registry.get_sample_value(f"vllm:kv_eviction_{name}", {**LABELS, **labels})


def test_series_exist_before_anything_happens(exported, registry):
    for name in COUNTERS:
        assert value(registry, f"{name}_total") == 0
    assert math.isnan(value(registry, "live_share"))


def test_a_step_is_added_and_the_live_share_of_nothing_is_not_a_number(exported, registry):
    scored = {"token_mass": 0.5}
    exported.observe(
        {"blocks_evicted": 3, "requests": {"h2o": 2}, "scoring_seconds": scored, "live_share": 0.25}
    )
    assert value(registry, "scoring_seconds_total", phase="token_mass") == 0.5
    assert value(registry, "blocks_evicted_total") == 3
    assert value(registry, "requests_total", policy="h2o") == 2
    assert value(registry, "live_share") == 0.25
    exported.observe({"blocks_evicted": 1, "requests": {}, "live_share": None})
    assert value(registry, "blocks_evicted_total") == 4
    assert math.isnan(value(registry, "live_share"))


def test_vllms_log_line_adds_up_steps_and_shows_the_newest_share():
    stats = EvictionStats(
        {"decisions": 1, "requests": {"h2o": 1}, "peak_blocks": [4, 8], "live_share": 0.9}
    )
    stats.aggregate(
        EvictionStats(
            {"decisions": 2, "requests": {"cab": 1}, "peak_blocks": [9], "live_share": 0.5}
        )
    )
    shown = stats.reduce()
    assert shown["decisions"] == 3
    assert shown["requests_h2o"] == shown["requests_cab"] == 1
    assert shown["live_share"] == 0.5
    assert shown["mean_peak_blocks"] == 7
    assert "mean_effective_sparsity" not in shown  # no request has ended with one
    stats.aggregate(EvictionStats({"live_share": None}))
    assert "live_share" not in stats.reduce()


def test_vllms_log_line_says_whose_it_is():
    """vLLM's own words stand before it; nothing is transferred."""
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging

    logging = KVConnectorLogging(None)
    logging.transfer_stats_accumulator = EvictionStats({"blocks_evicted": 7})
    lines = []
    logging.log(lambda text, *values: lines.append(text % values))
    (line,) = lines
    assert line.startswith("KV Transfer metrics: KV eviction: blocks_evicted=7, decisions=0")


def test_requests_that_ended_are_counted_by_peak_and_sparsity(exported, registry):
    for name in ENDED:
        assert value(registry, f"{name}_count") == 0
    exported.observe({"peak_blocks": [3, 40.5], "effective_sparsity": [0.0, 0.9]})
    exported.observe({"blocks_evicted": 1})
    assert value(registry, "peak_blocks_count") == 2
    assert value(registry, "peak_blocks_sum") == 43.5
    assert value(registry, "peak_blocks_bucket", le="32.0") == 1
    assert value(registry, "effective_sparsity_bucket", le="0.0") == 1
    assert value(registry, "effective_sparsity_bucket", le="0.9") == 2
