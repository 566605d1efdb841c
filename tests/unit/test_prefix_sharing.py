"""What may be shared, who waits, and in which order the workers move what is shared."""

import torch

from vllm_plugins.attention.state_cpu import CPUWorkerState
from vllm_plugins.config import EvictionConfig
from vllm_plugins.messages import EvictionPlan
from vllm_plugins.packs import Pack
from vllm_plugins.prefix_sharing import PrefixSharing, Takeover
from vllm_plugins.worker import waves

from .simulated_scheduler import SchedulerOverMemory


def test_tokens_are_exact_up_to_the_first_eviction():
    sharing = PrefixSharing()
    assert sharing.num_exact("a") > 10**9
    sharing.first_eviction("a", 96)
    sharing.first_eviction("a", 128)
    assert sharing.num_exact("a") == 96, "later evictions change nothing"
    assert sharing.num_exact("b") > 10**9
    sharing.forget("a")
    assert sharing.num_exact("a") > 10**9, "a preempted request starts again"


def test_a_block_is_awaited_in_the_step_it_is_computed_in():
    sharing = PrefixSharing()
    sharing.expect(["x", "y"], step=4)
    sharing.expect(["y", "z"], step=4)
    assert [sharing.is_expected(h, 4) for h in "wxyz"] == [False, True, True, True]
    assert not sharing.is_expected("x", 5), (
        "whoever goes on says so again; nobody else is waited for"
    )
    sharing.expect(["w"], step=5)
    assert [sharing.is_expected(h, 5) for h in "wx"] == [True, False]


def pack(*block_ids, group=0):
    return Pack(group, list(block_ids), 1, 2, 100, 0, "h2o", {})


def of(*made):
    return [
        (wave.copies, {name: list(packs) for name, packs in wave.packs.items()}) for wave in made
    ]


def test_a_pack_goes_before_a_copy_into_what_it_reads():
    copies = {
        "b": Takeover(copies=[(0, 20, 7)]),  # 7 was one of a's candidates
        "c": Takeover(copies=[(0, 30, 9)]),
        "new": Takeover(copies=[(0, 50, 5)]),
    }
    a, b, c, d = pack(5, 6, 7), pack(7, 21), pack(9, 31), pack(40)
    plan = EvictionPlan(packs={"a": [a], "b": [b], "c": [c], "d": [d]}, takeovers=copies)
    assert of(*waves(plan)) == [
        ([], {"a": [a]}),
        ([(0, 20, 7), (0, 30, 9)], {"b": [b], "c": [c], "d": [d]}),
        ([(0, 50, 5)], {}),
    ]
    assert of(*waves(EvictionPlan())) == [([], {}), ([], {})]


def test_layer_groups_of_one_request_share_the_memory_of_blocks():
    """The first group's pack reads a block for the last time that is the second group's copy."""
    first, second = pack(5, 6, 7), pack(7, 8, group=1)
    takeover = Takeover(copies=[(0, 4, 5), (1, 9, 7)])
    plan = EvictionPlan(packs={"a": [first, second]}, takeovers={"a": takeover})
    assert of(*waves(plan)) == [
        ([(0, 4, 5)], {"a": [first]}),
        ([(1, 9, 7)], {"a": [second]}),
        ([], {}),
    ]


def worker(num_blocks=12):
    """A worker's state over two layers' caches of 2 heads, 4 tokens a block, 3 numbers a token."""
    state = CPUWorkerState(EvictionConfig.parse({"policy": "cab", "sparsity": 0.5}))
    state.set_layers({0: ["one", "two"]})
    torch.manual_seed(0)
    state.register({name: torch.randn(num_blocks, 2, 4, 6) for name in ("one", "two")})
    for array in state.tokens.arrays().values():
        array.copy_(torch.randint(1, 1000, array.shape))
    for numbers in (state.mass, state.num_queries, state.norm):
        numbers.copy_(torch.randint(1, 1000, numbers.shape))
    return state


def test_a_copy_has_keys_values_and_scores():
    state, before = worker(), worker()
    state.copy_blocks([(0, 2, 5), (0, 1, 2), (0, 3, 6)])
    for copy, block in ((5, 2), (2, 1), (6, 3)):
        for name, cache in state.kv_caches.items():
            assert torch.equal(cache[copy], before.kv_caches[name][block])
        for name, array in state.tokens.arrays().items():
            assert torch.equal(array[:, copy], before.tokens.arrays()[name][:, block])
        assert state.mass[copy] == before.mass[block]
    for name, cache in state.kv_caches.items():
        assert torch.equal(cache[7:], before.kv_caches[name][7:])


def test_copies_are_made_in_order_whatever_their_layer_groups():
    """59 was copied, was free, and became another group's copy."""
    state = CPUWorkerState(EvictionConfig.parse({"policy": "cab", "sparsity": 0.5}))
    state.set_layers({0: ["one"], 1: ["two"]})
    shared = torch.arange(12.0)[:, None, None, None].expand(12, 2, 4, 6).contiguous()
    state.register({"one": shared, "two": shared})  # groups share the memory of blocks
    state.copy_blocks([(0, 1, 8), (1, 5, 7), (0, 2, 5), (1, 5, 9)])
    assert [float(shared[i, 0, 0, 0]) for i in (8, 7, 5, 9)] == [1.0, 5.0, 2.0, 2.0]


def test_adopted_blocks_know_their_places_and_start_without_scores():
    state, before = worker(), worker()
    state.adopt([Takeover(adopted=[(7, 0), (3, 1)], starts_afresh=True)])
    assert state.tokens.position[1, 7, 0].tolist() == [0, 1, 2, 3]
    assert state.tokens.position[0, 3, 1].tolist() == [4, 5, 6, 7]
    assert not state.tokens.mass[:, [3, 7]].any()
    assert not state.tokens.peak[:, [3, 7]].any()
    assert state.mass[[3, 7]].tolist() == [0, 0]
    assert torch.equal(state.norm, before.norm), "which the block's own keys give"
    assert torch.equal(state.tokens.mass[:, 4:7], before.tokens.mass[:, 4:7])


def test_blocks_that_others_score_keep_their_scores():
    state, before = worker(), worker()
    state.adopt([Takeover(adopted=[(7, 0)])])
    assert state.tokens.position[1, 7, 0].tolist() == [0, 1, 2, 3]
    assert torch.equal(state.tokens.mass, before.tokens.mass)
    assert torch.equal(state.mass, before.mass)


def test_a_request_of_one_step_is_shared_and_scored_like_stocks(tiny_config):
    """A beam, or a question with an answer of one token: no step is left to evict for."""
    over = SchedulerOverMemory(tiny_config, 64, 1, asynchronous=False, priority=False)
    h2o = {"kv_policy": "h2o", "kv_granularity": "token", "kv_sparsity": 0.9}
    asked = [(60, 1, h2o), (60, 1, h2o), (60, 2, h2o), (65, 1, h2o)]
    asked.append((60, 2, {**h2o, "kv_policy": "streaming"}))
    gathers = []
    for length, max_tokens, settings in asked:
        over.add(list(range(length)), max_tokens, settings, priority=0)
        name = list(over.arrivals)[-1]
        gathers.append(over.scheduler.connector.ledger.gathers_attention(name))
        over.drain()
    over.check_empty()
    assert gathers == [False, False, True, True, False], "65 tokens are more than a chunk"
    cached = [arrival.record["cached_tokens"] for arrival in over.arrivals.values()]
    assert cached == [0, 32, 0, 32, 32]
