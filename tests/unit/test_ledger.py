"""Scheduler-side bookkeeping, without vLLM."""

from dataclasses import dataclass

import numpy as np
import pytest

from vllm_plugins.config import EvictionConfig
from vllm_plugins.ledger import Ledger
from vllm_plugins.policies import Policy, registry

BLOCK = 4


@dataclass
class FakeRequest:
    request_id: str
    num_prompt_tokens: int
    num_tokens: int
    num_computed_tokens: int = 0
    num_preemptions: int = 0
    finished: bool = False

    def is_finished(self) -> bool:
        return self.finished


@dataclass
class FakeBlock:
    block_id: int


class Bench:
    """One request in a ledger, its blocks numbered from 100."""

    def __init__(self, extra, *, num_tokens=80, groups=1, **settings):
        self.config = EvictionConfig.parse(
            {"policy": "h2o", "sparsity": 0.5, "granularity": "block", **settings}
        )
        self.ledger = Ledger(self.config, BLOCK, groups, num_blocks=200)
        self.request = FakeRequest("r", num_tokens, num_tokens)
        self.ledger.admit(self.request, self.config.request_settings(extra, BLOCK), seed=1)
        self.blocks = [FakeBlock(100 + i) for i in range(num_tokens // BLOCK)]

    def step(self, num_tokens, scores=None, num_pool_blocks=0):
        """Schedule a step up to ``num_tokens`` and report its scores."""
        step = self.ledger.schedule({"r": num_tokens}, num_pool_blocks)
        if scores is not None:
            self.ledger.observe(step, {"attention": scores})
        return step

    def decide(self, num_tokens, group=0):
        return self.ledger.decide("r", group, num_tokens, self.blocks)


def scores(values):
    array = np.zeros(200)
    array[100 : 100 + len(values)] = values
    return array


def test_evicts_the_lightest_down_to_the_budget():
    bench = Bench({"kv_sparsity": 0.5})
    weights = np.arange(20.0)[::-1]
    bench.step(80, scores(weights))
    victims = bench.decide(80)
    # 10 blocks stay: two recent (20%), and the eight heaviest, the first ones here.
    assert victims == list(range(8, 18))
    assert bench.ledger.take_evictions() == {"r": {0: victims}}
    assert bench.ledger.take_evictions() == {}
    assert bench.decide(80) == []


def test_a_block_whose_scores_have_not_arrived_is_not_considered():
    bench = Bench({"kv_sparsity": 0.9}, num_tokens=40)
    assert bench.decide(40) == [], "no report at all"
    first = bench.step(20)
    bench.step(40)
    bench.ledger.observe(first, {"attention": scores(range(10))})
    # The report includes 20 tokens, 5 blocks, one more than the four that may stay.
    victims = bench.decide(40)
    assert victims
    assert max(victims) < 5


def test_the_block_being_written_is_never_considered():
    bench = Bench({"kv_policy": "streaming", "kv_sparsity": 0.9}, num_tokens=80)
    assert bench.decide(19) == []  # four full blocks and one in progress
    assert bench.decide(23) == [1]


def test_a_policy_without_scores_does_not_wait_for_them():
    bench = Bench({"kv_policy": "random", "kv_sparsity": 0.5})
    assert len(bench.decide(80)) == 10


def test_random_repeats_by_prompt_and_differs_by_seed():
    def victims(seed):
        bench = Bench({"kv_policy": "random", "kv_sparsity": 0.5})
        bench.ledger.requests["r"].seed = seed
        bench.ledger.requests["r"].restart()
        return bench.decide(80)

    assert victims(1) == victims(1)
    assert victims(1) != victims(2)


def test_preemption_forgets_scores_and_blocks():
    bench = Bench({"kv_sparsity": 0.9})
    step = bench.step(80)
    bench.ledger.release("r")
    bench.ledger.observe(step, {"attention": scores(range(20))})
    assert bench.decide(80) == [], "a report from before the preemption describes freed blocks"
    bench.step(40, scores(range(20)))
    victims = bench.decide(40)
    assert victims
    bench.ledger.release("r")
    assert bench.ledger.take_evictions() == {}, "victims of a preempted request are not sent"


def test_groups_have_victims_of_their_own():
    bench = Bench({"kv_sparsity": 0.5}, groups=2)
    bench.step(80, scores(range(20)))
    first = bench.decide(80, group=0)
    other = [FakeBlock(150 + i) for i in range(20)]
    second = bench.ledger.decide("r", 1, 80, other)
    assert len(first) == len(second) == 10
    assert bench.ledger.take_evictions() == {"r": {0: first, 1: second}}


def test_a_finished_request_is_left_alone():
    bench = Bench({"kv_policy": "streaming", "kv_sparsity": 0.9})
    bench.request.finished = True
    assert bench.decide(80) == []
    record = bench.ledger.finish("r")
    assert record["blocks_evicted"] == 0
    assert bench.ledger.finish("r") == {}
    assert bench.ledger.requests == {}


def test_counters_prove_the_knob():
    bench = Bench({"kv_sparsity": 0.5}, trace_decisions=True)
    bench.step(80, scores(range(20)), num_pool_blocks=25)
    bench.decide(80)
    bench.step(80, num_pool_blocks=15)
    record = bench.ledger.finish("r")
    assert record["decisions"] == 1
    assert record["blocks_evicted"] == 10
    assert record["first_eviction_tokens"] == 80
    assert record["peak_blocks"] == 20
    assert record["average_blocks"] == 15
    assert record["peak_pool_blocks"] == 25
    assert record["decision_seconds"] > 0
    assert len(record["trace"][0]["kept"]) == 10
    assert bench.ledger.totals["blocks_evicted"] == 10


def test_a_failing_policy_is_counted_and_evicts_nothing(monkeypatch):
    def broken(scores, positions, keep, *, num_sink_blocks):
        return np.arange(len(positions))

    monkeypatch.setitem(registry._BUILT_IN, "streaming", Policy("streaming", broken))
    registry.get_policy.cache_clear()
    try:
        bench = Bench({"kv_policy": "streaming", "kv_sparsity": 0.5})
        assert bench.decide(80) == []
        assert bench.decide(80) == []
        assert "budget of 10" in bench.ledger.finish("r")["policy_error"]
        assert bench.ledger.totals["policy_errors"] == 1
    finally:
        monkeypatch.undo()
        registry.get_policy.cache_clear()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("policy", ["h2o", "cab"])
def test_scores_that_are_no_numbers_are_a_policy_error(policy, value):
    """Comparisons with NaN are false: the policy itself would keep too little and not notice."""
    bench = Bench({"kv_policy": policy, "kv_sparsity": 0.5})
    broken = np.arange(20.0)
    broken[7] = value
    bench.step(80, scores(broken))
    assert bench.decide(80) == []
    assert "NaN or infinity" in bench.ledger.finish("r")["policy_error"]


@pytest.mark.parametrize("granularity", ["block", "token"])
def test_where_memory_is_planned_by_budgets_a_failed_policy_keeps_what_is_recent(granularity):
    bench = Bench({}, granularity=granularity, request_budgets="server")
    bench.step(80, scores(np.full(20, np.nan)))
    if granularity == "block":
        assert bench.decide(80) == []
    else:
        bench.ledger.pack_failed("r", "RuntimeError: out of ideas")
    victims = bench.decide(80)
    assert len(victims) == 10
    kept = sorted(set(range(20)) - set(victims))
    assert kept == [0, *range(11, 20)], "the first block, and the last nine"
    if granularity == "token":
        (pack,) = bench.ledger.take_packs()["r"]
        assert pack.policy == "streaming"
    record = bench.ledger.finish("r")
    assert record["policy"] == "h2o"
    assert record["policy_error"]
    assert bench.ledger.totals["policy_errors"] == 1


def test_a_record_tells_the_sparsity_that_its_budget_allowed():
    bench = Bench({"kv_sparsity": 0.9}, num_tokens=80)
    bench.step(80, scores(np.arange(20.0)))
    assert bench.decide(80)
    assert bench.ledger.finish("r")["effective_sparsity"] == pytest.approx(0.8)  # 4 of 20 stay


def test_a_request_that_ended_before_its_first_eviction_had_no_sparsity():
    bench = Bench({"kv_sparsity": 0.9}, num_tokens=80)
    assert bench.ledger.finish("r")["effective_sparsity"] == 0


def test_graph_follows_the_live_blocks():
    bench = Bench({"kv_policy_args": {}, "kv_sparsity": 0.5})
    live = bench.ledger.requests["r"].groups[0]
    live.extend(3, bench.blocks)
    ids = np.array([100, 101, 102])
    live.add_graph_row(102, ids, np.array([1.0, 2.0, 3.0]))
    live.add_graph_row(102, ids, np.array([1.0, 0.0, 0.0]))
    live.add_graph_row(101, ids[:2], np.array([5.0, 6.0]))
    assert live.graph(200).tolist() == [[0, 0, 0], [5, 6, 0], [2, 2, 3]]
    live.retain(np.array([0, 2]))
    assert live.graph(200).tolist() == [[0, 0], [2, 3]]
    assert 101 not in live.graph_rows


def test_what_was_under_way_for_a_former_owner_of_a_row_is_not_the_next_ones():
    bench = Bench({"kv_sparsity": 0.9}, num_tokens=40)
    late = bench.step(40)
    bench.ledger.finish("r")
    bench.ledger.admit(bench.request, bench.config.request_settings(None, BLOCK), seed=1)
    bench.ledger.observe(late, {"attention": scores(range(10))})
    assert bench.ledger.requests["r"].num_scored_tokens == 0
    assert bench.decide(40) == []


def test_nothing_is_kept_for_reports_that_nobody_waits_for():
    """On a GPU no report comes while no request needs scores of blocks."""
    for extra in (
        {"kv_policy": "streaming", "kv_sparsity": 0.5},
        {"kv_policy": "h2o", "kv_sparsity": 0.5, "kv_granularity": "token"},
    ):
        bench = Bench(extra)
        for tokens in range(1, 80):
            bench.step(tokens)
        assert not bench.ledger.table._under_way


def test_more_requests_than_rows_are_not_counted_twice():
    config = EvictionConfig.parse({"policy": "streaming", "sparsity": 0.5, "granularity": "block"})
    ledger = Ledger(config, BLOCK, 1, num_blocks=10)
    blocks = [FakeBlock(i) for i in range(20)]
    for i in range(100):
        request = FakeRequest(f"r{i}", 80, 80)
        ledger.admit(request, config.request_settings(None, BLOCK), seed=i)
        ledger.schedule({request.request_id: 80}, 0)
        ledger.decide(request.request_id, 0, 80, blocks)
    assert ledger.live_share == 0.5
    assert int(ledger.table.seen.sum()) == 100 * 20
    ledger.admit(FakeRequest("r3", 80, 80), config.request_settings(None, BLOCK), seed=3)
    assert int(ledger.table.seen.sum()) == 99 * 20, "a name that came again"
    for i in range(100):
        ledger.finish(f"r{i}")
    assert ledger.live_share is None


def test_more_requests_than_rows_keep_their_numbers():
    config = EvictionConfig.parse({"policy": "streaming", "sparsity": 0.5})
    ledger = Ledger(config, BLOCK, 1, num_blocks=10)
    names = [f"r{i}" for i in range(200)]
    for i, name in enumerate(names):
        settings = config.request_settings(None, BLOCK)
        ledger.admit(FakeRequest(name, 4 + i, 4 + i), settings, seed=i)
        ledger.schedule({n: 4 * BLOCK for n in names[: i + 1]}, i)
    records = [ledger.finish(name) for name in names]
    assert [r["num_steps"] for r in records] == list(range(200, 0, -1))
    assert {(r["peak_blocks"], r["average_blocks"]) for r in records} == {(4, 4)}


def test_live_share_is_of_requests_that_evict():
    bench = Bench({"kv_sparsity": 0.5})
    assert bench.ledger.live_share is None
    bench.step(80, scores(range(20)))
    bench.decide(80)
    assert bench.ledger.live_share == 0.5
    bench.ledger.finish("r")
    assert bench.ledger.live_share is None


def test_unknown_requests_are_harmless():
    ledger = Ledger(EvictionConfig(), BLOCK, 1, 10)
    assert ledger.decide("nobody", 0, 100, []) == []
    ledger.release("nobody")
    assert ledger.schedule({"nobody": 4}, 0) == 1
    assert ledger.finish("nobody") == {}
    assert ledger.live_share is None


@pytest.mark.parametrize("policy", ["h2o", "cab"])
def test_budget_never_shrinks_below_the_prompts_share(policy):
    """Early in a long prompt the budget is already that of the whole prompt."""
    bench = Bench({"kv_policy": policy, "kv_sparsity": 0.5}, num_tokens=80)
    bench.step(40, scores(range(20)))
    assert bench.decide(40) == []  # 10 blocks live, 10 may stay


def test_a_pack_names_the_candidates_and_frees_what_lies_between():
    token = {"kv_policy": "h2o", "kv_sparsity": 0.5, "kv_granularity": "token"}
    bench = Bench(token, slack_tokens=4 * BLOCK)
    assert bench.decide(56) == [], "14 blocks are four over the budget: within the slack"
    bench.request.num_computed_tokens = 84  # a step is in flight; its queries will be scored
    victims = bench.decide(80)
    # 10 of 20 blocks stay: two recent ones, and a region of eight.
    assert victims == list(range(8, 18))
    (pack,) = bench.ledger.take_packs()["r"]
    assert pack.block_ids == list(range(100, 118))
    assert (pack.num_kept_blocks, pack.budget_blocks, pack.num_tokens) == (8, 10, 84)
    assert bench.ledger.take_packs() == {}
    assert bench.ledger.take_evictions() == {"r": {0: victims}}


def test_after_a_pack_nothing_is_due_until_the_slack_is_full_again():
    bench = Bench({"kv_granularity": "token", "kv_sparsity": 0.5}, slack_tokens=4 * BLOCK)
    assert bench.decide(60)
    due = bench.ledger.requests["r"].due[0]
    assert due == 80, "15 blocks have been seen, and four may come before one is too many"
    assert bench.decide(due - 1) == []
    assert bench.decide(due)


def test_a_pack_waits_for_no_score():
    token = {"kv_policy": "cab", "kv_sparsity": 0.5, "kv_granularity": "token"}
    assert len(Bench(token).decide(80)) == 10


def test_a_pack_that_finds_no_block_to_copy_into_waits_and_is_counted():
    token = {"kv_policy": "h2o", "kv_sparsity": 0.5, "kv_granularity": "token"}
    bench = Bench(token)
    for _ in range(2):
        assert bench.ledger.decide("r", 0, 80, bench.blocks, lambda name, positions: None) == []
    assert bench.ledger.take_packs() == {}
    found = bench.ledger.decide("r", 0, 80, bench.blocks, lambda name, positions: positions)
    assert len(found) == 10
    record = bench.ledger.finish("r")
    assert (record["decisions"], record["decisions_deferred"]) == (1, 2)


def test_a_preempted_requests_pack_is_dropped():
    """Its blocks may be another's when the workers come to it."""
    token = {"kv_policy": "h2o", "kv_sparsity": 0.5, "kv_granularity": "token"}
    bench = Bench(token)
    assert bench.decide(80)
    bench.ledger.release("r")
    assert bench.ledger.take_packs() == {}


def test_a_ranking_that_failed_in_a_worker_ends_the_requests_evictions():
    token = {"kv_policy": "h2o", "kv_sparsity": 0.5, "kv_granularity": "token"}
    bench = Bench(token, num_tokens=120)
    assert bench.decide(100)
    bench.ledger.pack_failed("r", "RuntimeError: out of ideas")
    assert bench.decide(120) == []
    assert bench.ledger.finish("r")["policy_error"] == "RuntimeError: out of ideas"
    assert bench.ledger.totals["policy_errors"] == 1
