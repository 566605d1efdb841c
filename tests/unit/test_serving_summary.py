"""Streams and statistics: server-sent events, latencies, throughput, goodput, objectives."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.analysis.quality import kept_to_chunk
from harness.analysis.serving_aggregate import (
    aggregate_serving,
    max_rates,
    with_shared_perplexity,
)
from harness.client.result import FAILED, NOT_SENT, SUCCEEDED, TIMED_OUT, Result
from harness.client.scrape import parse_cache_config, parse_metrics
from harness.client.slo import check_run_slo, holds, parse_slo
from harness.client.sse import EventParser
from harness.client.summary import (
    counts,
    distribution,
    failures,
    latencies,
    members_of,
    peak_concurrency,
    spans,
    summarize,
    token_timeline,
)
from harness.errors import UsageError
from harness.records.former_names import load_in_todays_names

STREAM = (
    b": ping\r\n\r\ndata: one\r\n\r\nevent: x\ndata: two\ndata: more\n\n"
    b"data:three\r\rid: 7\n\ndata: [DONE]\n\n"
)
EVENTS = [b"one", b"two\nmore", b"three", b"[DONE]"]


@given(st.lists(st.integers(1, len(STREAM) - 1), max_size=12))
def test_events_are_the_same_however_the_bytes_arrive(cuts):
    edges = [0, *sorted(cuts), len(STREAM)]
    parser = EventParser()
    events = [e for a, b in pairwise(edges) for e in parser.feed(STREAM[a:b])]
    assert events == EVENTS
    assert not parser.unfinished


def test_an_event_without_its_empty_line_is_unfinished():
    parser = EventParser()
    assert parser.feed(b"data: half\n") == []
    assert parser.unfinished


def result(index, intended, sent, chunks, end=None, tokens=None, status=SUCCEEDED, kind="load"):
    made = Result(index, kind, intended, status, sent, chunks=list(chunks))
    made.end = end if end is not None else (chunks[-1] if chunks else sent)
    made.output_tokens = tokens if tokens is not None else len(chunks)
    return made


def test_distribution():
    values = distribution([1.0, 2.0, 3.0, 4.0])
    assert values["mean"] == 2.5
    assert values["std"] == pytest.approx(np.std([1, 2, 3, 4], ddof=1))
    assert values["p50"] == 2.5
    assert values["p90"] == pytest.approx(3.7)
    assert values["count"] == 4
    assert distribution([]) is None
    assert distribution([5.0])["std"] is None


def test_open_loop_latency_counts_from_the_intended_time():
    late = result(0, 1.0, 3.0, [4.0, 4.5, 5.0])
    assert latencies(late, open_loop=True) == {
        "time_to_first_token_ms": 3000.0,
        "time_per_output_token_ms": 500.0,
        "end_to_end_latency_ms": 4000.0,
    }
    assert latencies(late, open_loop=False)["time_to_first_token_ms"] == 1000.0


def test_one_token_has_no_time_per_output_token():
    assert latencies(result(0, 0.0, 0.0, [1.0]), True)["time_per_output_token_ms"] is None


RESULTS = [
    result(0, 0.0, 0.001, [1.0, 2.0], tokens=4),
    result(1, 1.0, 1.001, [1.5, 3.0, 4.0]),
    result(2, 2.0, 2.5, [], status=TIMED_OUT, end=9.0),
    result(3, 3.0, 3.002, [5.0, 10.0]),
    result(4, 4.0, None, [], status=NOT_SENT, end=None),
]


def test_counts_keep_every_request_apart():
    assert counts(RESULTS) == {
        "planned": 5,
        "succeeded": 3,
        "failed": 0,
        "timed_out": 1,
        "incomplete": 0,
        "not_sent": 1,
    }


def test_throughput_of_the_whole_run():
    span = spans(RESULTS, 0, 0)["all"]
    assert span == (0.0, 10.0)
    summary = summarize(RESULTS, RESULTS, span, True, {"time_to_first_token_ms": 1500.0})
    assert summary["request_throughput"] == 0.3
    assert summary["output_throughput"] == pytest.approx((4 + 3 + 2) / 10)
    assert summary["goodput"] == 0.2
    assert summary["good_share"] == 0.4
    assert summary["time_to_first_token_ms"]["max"] == pytest.approx(2000)
    assert summary["send_lag_ms"]["max"] == pytest.approx(500)
    assert summary["inter_token_latency_ms"]["count"] == 4


def test_warm_up_and_cool_down_leave_requests_out_of_the_steady_figures_only():
    ranges = spans(RESULTS, 0.5, 0.5)
    assert ranges["all"] == (0.0, 10.0)
    assert ranges["steady"] == pytest.approx((0.5, 2.502))
    members = members_of(RESULTS, ranges["steady"])
    assert [r.index for r in members] == [1, 2]
    summary = summarize(RESULTS, members, ranges["steady"], True, {})
    # Tokens count when they arrive, also those of a request that began before.
    assert summary["output_throughput"] == pytest.approx((2 + 2 + 1) / 2.002)
    assert summary["goodput"] is None


def test_nothing_succeeded_gives_no_latency():
    summary = summarize(RESULTS[2:3], RESULTS[2:3], (0.0, 9.0), True, {"time_to_first_token_ms": 1})
    assert summary["time_to_first_token_ms"] is None
    assert summary["goodput"] == 0.0


def test_peak_concurrency():
    assert peak_concurrency(RESULTS) == 3
    touching = [result(0, 0, 0.0, [1.0]), result(1, 1, 1.0, [2.0])]
    assert peak_concurrency(touching) == 1


def test_timeline_adds_up():
    tokens = token_timeline(RESULTS, np.arange(0, 11.5, 0.5))
    assert tokens.sum() == 9
    assert token_timeline([], np.arange(3)).tolist() == [0, 0]


def test_failures_are_grouped_by_kind():
    made = [result(i, 0.0, 0.0, [], status=FAILED) for i in range(3)]
    for item, error in zip(made, ["http_500", "http_400", "http_500"], strict=True):
        item.error, item.message = error, f"{error} happened"
    rows = failures(made)
    assert [(row["error"], row["count"]) for row in rows] == [("http_500", 2), ("http_400", 1)]
    assert rows[0]["message"] == "http_500 happened"


METRICS = """# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
vllm:num_requests_running_by_reason{engine="0",reason="x"} 9.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:num_preemptions_total{engine="0"} 2.0
vllm:kv_eviction_blocks_evicted_total{engine="0"} 17.0
vllm:kv_eviction_blocks_evicted_created{engine="0"} 1.7e9
vllm:kv_eviction_requests_total{engine="0",policy="cab"} 5.0
vllm:kv_eviction_peak_blocks_bucket{engine="0",le="8.0"} 1.0
vllm:kv_eviction_peak_blocks_bucket{engine="0",le="+Inf"} 2.0
vllm:kv_eviction_peak_blocks_count{engine="0"} 2.0
vllm:kv_eviction_peak_blocks_sum{engine="0"} 40.0
vllm:cache_config_info{block_size="32",kv_cache_memory_bytes="100",num_gpu_blocks="135"} 1
process_open_fds 7
"""


def test_metrics():
    assert parse_metrics(METRICS) == {
        "num_requests_running": 7.0,
        "kv_cache_usage": 0.25,
        "num_preemptions": 2.0,
        "kv_eviction_blocks_evicted": 17.0,
        "kv_eviction_requests:cab": 5.0,
        "kv_eviction_peak_blocks_count": 2.0,
        "kv_eviction_peak_blocks_sum": 40.0,
    }
    assert parse_cache_config(METRICS) == {
        "block_size": 32,
        "kv_cache_memory_bytes": 100,
        "num_gpu_blocks": 135,
    }


def test_objectives():
    assert parse_slo(["time_to_first_token_ms:20"]) == {"time_to_first_token_ms": 20.0}
    check_run_slo({"time_to_first_token_ms": {"p99": 2000}})
    for wrong in (
        {"latency": {"p99": 1}},
        {"time_to_first_token_ms": {"p98": 1}},
        {"time_to_first_token_ms": 5},
    ):
        with pytest.raises(UsageError, match="slo"):
            check_run_slo(wrong)


def test_a_run_with_failures_keeps_no_objective():
    good = summarize(RESULTS[:2], RESULTS[:2], (0.0, 4.0), True, {})
    assert holds(good, {"time_to_first_token_ms": {"p99": 1001}})
    assert not holds(good, {"time_to_first_token_ms": {"p99": 900}})
    failed = summarize(RESULTS, RESULTS, (0.0, 10.0), True, {})
    assert not holds(failed, {"time_to_first_token_ms": {"p99": 1e9}})


def serving_record(method, rate, seed, ttft, stays=(), cut_off=()):
    run = [result(i, 0.0, 0.0, [ttft, ttft + 1.0]) for i in range(3)]
    sent, end = zip(*stays, strict=True) if stays else ((), ())
    return load_in_todays_names(
        {
            "run": {
                "method": method,
                "sparsity": 0.9 if method != "dense" else 0.0,
                "request_rate": rate,
                "seed": seed,
                "slo": {"time_to_first_token_ms": {"p99": 2000}},
            },
            "counts": counts(run),
            "duration_s": 5.0,
            "quality": None,
            "memory": {
                "kv_cache_memory_bytes": 1 << 20,
                "kv_cache_usage": {"mean": 0.5, "max": 1.0},
                "num_requests_running": {"mean": 2.0, "max": 3.0},
            },
            "summary": {"steady": summarize(run, run, (0.0, 5.0), True, {})},
            "requests": {"sent_s": list(sent), "end_s": list(end)},
            "not_succeeded": [{"sent_s": a, "end_s": b} for a, b in cut_off],
        }
    )


def test_the_highest_rate_is_the_last_before_the_first_that_breaks():
    times = {1.0: (1.0, 1.1), 2.0: (1.5, 1.9), 4.0: (1.9, 2.1), 8.0: (1.0, 1.0)}
    records = [
        serving_record("h2o", rate, seed, ttft)
        for rate, pair in times.items()
        for seed, ttft in enumerate(pair)
    ]
    records.append(serving_record("dense", 1.0, 0, 3.0))
    entries = aggregate_serving(records)
    h2o = {"method": "h2o", "sparsity": 0.9, "budget_tokens": None}
    dense = {"method": "dense", "sparsity": 0.0, "budget_tokens": None}
    assert max_rates(entries) == {
        "h2o_s0.9": {**h2o, "max_rate": 2.0, "first_broken": 4.0},
        "dense_s0.0": {**dense, "max_rate": None, "first_broken": 1.0},
    }
    first = entries["h2o_s0.9_rate1"]
    assert first["num_runs"] == 2
    ttft = first["time_to_first_token_ms.p50"]
    assert ttft["mean"] == pytest.approx(1050)
    # t interval of two values: 12.706 standard errors of 50 ms.
    assert ttft["high"] - ttft["mean"] == pytest.approx(635.3, abs=0.2)
    assert first["kv_mib_per_request"]["mean"] == 0.25


@pytest.mark.parametrize(
    ("sent", "seconds", "growth"),
    [
        (range(100), lambda second: 2, 1.0),
        ([*range(0, 50, 5), *range(50, 100)], lambda second: 30, 1.0),
        (range(100), lambda second: 1 + second, 76 / 26),
    ],
    ids=["even", "more come later, into an empty server", "it falls behind"],
)
def test_how_long_requests_stay_shows_whether_a_rate_lasts(sent, seconds, growth):
    stays = [(second, second + seconds(second)) for second in sent]
    unsent = [(100, None), (None, None)]
    (entry,) = aggregate_serving([serving_record("h2o", 1.0, 0, 1.0, stays, unsent)]).values()
    assert entry["stay_growth"]["mean"] == pytest.approx(growth, rel=0.02)


def test_requests_that_ended_badly_stayed_too():
    stays = [(second, second + 2) for second in range(50)]
    timed_out = [(second, second + 6) for second in range(50, 100)]
    (entry,) = aggregate_serving([serving_record("h2o", 1.0, 0, 1.0, stays, timed_out)]).values()
    assert entry["stay_growth"]["mean"] == pytest.approx(3.0)


def test_ratios_are_paired_by_seed():
    # Seeds differ threefold, the method by a steady factor of two: the interval is tight.
    records = [serving_record("dense", 1.0, seed, t) for seed, t in enumerate((1.0, 3.0, 2.0))]
    records += [serving_record("h2o", 1.0, seed, t) for seed, t in enumerate((0.5, 1.5, 1.0))]
    results = aggregate_serving(records, "dense")
    assert results["dense_s0.0_rate1"]["against_baseline"] is None
    row = results["h2o_s0.9_rate1"]["against_baseline"]
    assert row["baseline"] == "dense"
    ratio = row["time_to_first_token_ms.p50"]
    assert ratio["mean"] == pytest.approx(0.5)
    assert ratio["high"] == pytest.approx(0.5)
    assert row["perplexity"] is None
    alone = aggregate_serving(records[3:], "dense")
    assert alone["h2o_s0.9_rate1"]["against_baseline"] is None


def quality_row(window, log_likelihood, steps=4, preemptions=0, evicted=3):
    return {
        "window": window,
        "log_likelihoods": [log_likelihood] * 4,
        "num_predictions": 255,
        "predictions_per_entry": 64,
        "eviction": {"num_steps": steps, "preemptions": preemptions, "blocks_evicted": evicted},
    }


def test_windows_of_another_chunk_do_not_count():
    assert kept_to_chunk(quality_row(0, -1.0))
    assert not kept_to_chunk(quality_row(0, -1.0, steps=1))
    assert not kept_to_chunk(quality_row(0, -1.0, preemptions=1))
    # Dense: the chunk changes nothing. A server without the plugin: no record.
    assert kept_to_chunk(quality_row(0, -1.0, steps=1, evicted=0))
    assert kept_to_chunk({**quality_row(0, -1.0), "eviction": {"first_eviction_tokens": None}})


@pytest.mark.parametrize("asked", [{"sparsity": 0.9}, {"sparsity": 0, "budget_tokens": 64}])
def test_a_window_computed_in_one_step_is_not_the_methods(asked):
    """Nothing could be evicted from it: its perplexity is the dense model's."""
    row = quality_row(0, -1.0, steps=1, evicted=0)
    row["eviction"] |= asked
    assert not kept_to_chunk(row)
    row["eviction"]["num_steps"] = 4  # a budget that spares the whole window
    assert kept_to_chunk(row)


def test_methods_are_compared_on_the_same_windows():
    dense, h2o = serving_record("dense", 1.0, 0, 1.0), serving_record("h2o", 1.0, 0, 1.0)
    dense["quality"] = {"windows": [quality_row(0, -64.0), quality_row(1, -6.4)]}
    h2o["quality"] = {"windows": [quality_row(0, -70.0), quality_row(1, -9.0, preemptions=1)]}
    shared = with_shared_perplexity([dense, h2o])
    assert [r["shared_windows"] for r in shared] == [1, 1]
    assert shared[0]["shared_perplexity"] == pytest.approx(np.exp(256 / 255))
    assert shared[1]["shared_perplexity"] == pytest.approx(np.exp(280 / 255))
    h2o["quality"]["windows"].pop(0)
    assert with_shared_perplexity([dense, h2o])[0]["shared_perplexity"] is None
