"""What may be shared, who waits, and in which order the workers move what is shared."""

import torch

from vllm_plugins.attention.state_cpu import CPUWorkerState
from vllm_plugins.config import EvictionConfig
from vllm_plugins.messages import EvictionPlan
from vllm_plugins.packs import Pack
from vllm_plugins.prefix_sharing import PrefixSharing, Takeover
from vllm_plugins.worker import waves


def test_tokens_are_exact_up_to_the_first_eviction():
    sharing = PrefixSharing()
    assert sharing.num_exact("a") > 10**9
    sharing.first_eviction("a", 96)
    sharing.first_eviction("a", 128)
    assert sharing.num_exact("a") == 96, "later evictions change nothing"
    assert sharing.num_exact("b") > 10**9
    sharing.forget("a")
    assert sharing.num_exact("a") > 10**9, "a preempted request starts again"


def test_a_block_is_awaited_while_somebody_computes_it():
    sharing = PrefixSharing()
    sharing.expect("a", ["x", "y"])
    sharing.expect("b", ["y", "z"])
    sharing.expect("a", ["w"])  # its next step
    assert [sharing.is_expected(h) for h in "wxyz"] == [True, False, True, True]
    sharing.forget("b")
    assert [sharing.is_expected(h) for h in "wyz"] == [True, False, False]
    sharing.first_eviction("a", 32)
    assert not sharing.is_expected("w"), "nobody can share what sees an evicted cache"


def pack(*block_ids):
    return [Pack(0, list(block_ids), 1, 2, 100, 0, "h2o", {})]


def test_a_pack_goes_before_a_copy_into_what_it_reads():
    copies = {
        "b": Takeover(copies=[(0, 20, 7)]),  # 7 was one of a's candidates
        "c": Takeover(copies=[(0, 30, 9)]),
    }
    packs = {"a": pack(5, 6, 7), "b": pack(7, 21), "c": pack(9, 31), "d": pack(40)}
    made = list(waves(EvictionPlan(packs=packs, takeovers=copies)))
    assert [list(wave) for wave in made] == [["a"], ["b", "c", "d"]]
    assert {name: packs for wave in made for name, packs in wave.items()} == packs
    assert list(waves(EvictionPlan())) == []


def worker(num_blocks=12):
    """A worker's state over two layers' caches of 2 heads, 4 tokens a block, 3 numbers a token."""
    state = CPUWorkerState(EvictionConfig.parse({"policy": "cab", "sparsity": 0.5}))
    state.set_layers({"one": 0, "two": 0})
    torch.manual_seed(0)
    state.register({name: torch.randn(num_blocks, 2, 4, 6) for name in ("one", "two")})
    for array in state.tokens.arrays().values():
        array.copy_(torch.randint(1, 1000, array.shape))
    for numbers in (state.mass, state.num_queries, state.norm):
        numbers.copy_(torch.randint(1, 1000, numbers.shape))
    return state


def test_a_copy_has_keys_values_and_scores_of_what_was_there_before():
    """Block 2 is copied to 5 and becomes a copy of 1, whatever the order they are told in."""
    for order in ([(0, 1, 2), (0, 2, 5)], [(0, 2, 5), (0, 1, 2)]):
        state, before = worker(), worker()
        state.copy_blocks(order)
        for name, cache in state.kv_caches.items():
            assert torch.equal(cache[5], before.kv_caches[name][2])
            assert torch.equal(cache[2], before.kv_caches[name][1])
            assert torch.equal(cache[6:], before.kv_caches[name][6:])
        for name, array in state.tokens.arrays().items():
            assert torch.equal(array[:, 5], before.tokens.arrays()[name][:, 2])
        assert state.mass[5] == before.mass[2] != before.mass[5]


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
