"""Compaction and block mass against references in float64."""

import math

import pytest
import torch

from vllm_plugins.attention.block_mass import block_mass
from vllm_plugins.attention.compaction import compact
from vllm_plugins.attention.state_cpu import CPUWorkerState
from vllm_plugins.attention.token_mass import token_mass
from vllm_plugins.config import EvictionConfig
from vllm_plugins.messages import EvictionPlan, ScoreReport

BLOCK = 8


def reference(query, key, seq_len, scale, soft_cap=0.0, decay=1.0, sinks=None):
    """Per query and block, float64, one query and head at a time: ``[T, n]``."""
    num_queries, num_heads, _ = query.shape
    group = num_heads // key.shape[0]
    per_query = torch.zeros(num_queries, key.shape[1] // BLOCK, dtype=torch.float64)
    for t in range(num_queries):
        visible = seq_len - num_queries + t + 1
        for h in range(num_heads):
            k = key[h // group, :visible].double()
            logits = (k @ query[t, h].double()) * scale
            if soft_cap:
                logits = soft_cap * torch.tanh(logits / soft_cap)
            if sinks is not None:
                logits = torch.cat((logits, sinks[h : h + 1].double()))
            weight = decay ** (num_queries - 1 - t)
            for j, p in enumerate(torch.softmax(logits, 0)[:visible].tolist()):
                per_query[t, j // BLOCK] += weight * p
    return per_query


def last(num_queries, seq_len):
    return torch.arange(seq_len - num_queries, seq_len)


@pytest.mark.parametrize("num_queries", [1, 5, 21])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize(("soft_cap", "decay"), [(0.0, 1.0), (5.0, 1.0), (0.0, 0.9)])
def test_block_mass_equals_the_dense_softmax(num_queries, heads, kv_heads, soft_cap, decay):
    torch.manual_seed(num_queries)
    seq_len = 21
    query = torch.randn(num_queries, heads, 16).bfloat16()
    key = torch.randn(kv_heads, 24, 16).bfloat16()
    key[:, seq_len:] = 1e4  # what lies behind the sequence must not matter
    expected = reference(query, key, seq_len, 0.25, soft_cap, decay)
    mass = block_mass(
        query,
        key,
        places=last(num_queries, seq_len),
        weights=decay ** torch.arange(num_queries - 1.0, -1.0, -1.0),
        block_size=BLOCK,
        scale=0.25,
        soft_cap=soft_cap,
    )
    torch.testing.assert_close(mass.double(), expected.sum(0), rtol=1e-5, atol=1e-5)
    if decay == 1.0:
        assert math.isclose(mass.sum().item(), num_queries * heads, rel_tol=1e-5)


@pytest.mark.parametrize("soft_cap", [0.0, 5.0])
def test_a_sink_takes_its_share_of_each_softmax(soft_cap):
    """It stands for no key, so what keys receive is less than one; no cap applies to it."""
    torch.manual_seed(0)
    query, key, sinks = torch.randn(13, 6, 16), torch.randn(2, 24, 16), 2 + torch.randn(6)
    expected = reference(query, key, 21, 0.25, soft_cap, sinks=sinks)
    options = {"places": last(13, 21), "weights": torch.ones(13), "scale": 0.25}
    options |= {"soft_cap": soft_cap, "sinks": sinks}
    by_block = block_mass(query, key, block_size=BLOCK, **options)
    torch.testing.assert_close(by_block.double(), expected.sum(0), rtol=1e-5, atol=1e-5)
    assert by_block.sum() < 0.9 * 13 * 6
    by_token, _ = token_mass(query, key, **options)
    torch.testing.assert_close(by_token.sum(0).view(-1, BLOCK).sum(-1), by_block)


def test_block_mass_by_block_of_queries():
    torch.manual_seed(0)
    query, key = torch.randn(13, 2, 16), torch.randn(2, 24, 16)
    query_blocks = torch.arange(21 - 13, 21) // BLOCK - 1
    mass = block_mass(
        query,
        key,
        places=last(13, 21),
        weights=torch.ones(13),
        block_size=BLOCK,
        scale=0.25,
        query_blocks=query_blocks,
    )
    per_query = reference(query, key, 21, 0.25)
    expected = torch.stack([per_query[query_blocks == b].sum(0) for b in range(2)])
    torch.testing.assert_close(mass.double(), expected, rtol=1e-5, atol=1e-5)


def test_block_mass_does_not_depend_on_how_queries_are_split(monkeypatch):
    torch.manual_seed(0)
    query, key = torch.randn(40, 2, 16), torch.randn(1, 48, 16)
    places, weights = last(40, 45), torch.rand(40)
    arguments = {"places": places, "weights": weights, "block_size": BLOCK, "scale": 0.25}
    whole = block_mass(query, key, **arguments)
    monkeypatch.setattr("vllm_plugins.attention.block_mass.QUERIES_AT_ONCE", 7)
    torch.testing.assert_close(block_mass(query, key, **arguments), whole)


@pytest.mark.parametrize("seed", range(20))
def test_compaction_for_any_pattern_of_nulls(seed):
    generator = torch.Generator().manual_seed(seed)
    requests, width = 6, 12
    seq_lens = torch.randint(0, width * BLOCK + 1, (requests,), generator=generator)
    seq_lens[0] = 0  # a padding row
    table = torch.randint(1, 1000, (requests, width), generator=generator, dtype=torch.int32)
    evicted = torch.rand(requests, width, generator=generator) < 0.5
    for row, seq_len in enumerate(seq_lens.tolist()):
        evicted[row, seq_len // BLOCK :] = False  # only full blocks are evicted
    table[evicted] = 0
    result = compact(table, seq_lens, BLOCK)
    assert result is not None
    for row, seq_len in enumerate(seq_lens.tolist()):
        num_blocks = -(-seq_len // BLOCK)
        live = [b for b in table[row, :num_blocks].tolist() if b]
        assert result[0][row, : len(live)].tolist() == live
        dropped = num_blocks - len(live)
        assert result[1][row] == seq_len - dropped * BLOCK


def test_compaction_leaves_a_table_without_nulls_alone():
    table = torch.tensor([[3, 4, 0], [5, 0, 0]], dtype=torch.int32)
    assert compact(table, torch.tensor([10, 3]), BLOCK) is None


def state(**settings):
    made = CPUWorkerState(EvictionConfig.parse(settings))
    made.set_layers({0: ["layer.0", "layer.1"]})
    made.register({name: torch.zeros(10, 2, BLOCK, 32) for name in made.group_of})
    return made


def test_nothing_is_gathered_or_reported_for_requests_that_need_nothing():
    worker = state()
    worker.start_step(EvictionPlan(step=1), set())
    assert not worker.active
    assert worker.report() is None
    worker.start_step(EvictionPlan(step=2, needs={"r": frozenset({"chance"})}), set())
    assert not worker.active
    worker.start_step(EvictionPlan(step=3, needs={"s": frozenset({"attention"})}), set())
    assert worker.active
    assert set(worker.report().scores) == {"attention"}
    worker.start_step(EvictionPlan(step=4), {"s"})
    assert not worker.active


def test_mean_divides_by_the_queries_that_saw_the_block():
    worker = state(score="mean")
    worker.start_step(EvictionPlan(step=1, needs={"r": frozenset({"attention"})}), set())
    worker.mass[3], worker.num_queries[3] = 6.0, 4.0
    report = worker.report()
    assert report.scores["attention"][3] == 1.5
    assert report.scores["attention"][4] == 0.0


def test_token_mass_is_the_attention_of_each_head():
    torch.manual_seed(0)
    query, key, weights = torch.randn(40, 4, 16), torch.randn(2, 48, 16), torch.rand(40)
    places = last(40, 45)
    mass, peak = token_mass(query, key, places=places, weights=weights, scale=0.25)
    logits = 0.25 * torch.einsum("qhgd,hkd->hgqk", query.double().view(40, 2, 2, 16), key.double())
    logits[..., torch.arange(48) > places[:, None]] = -torch.inf
    seen = logits.softmax(-1)
    expected = (seen * weights.double()[:, None]).sum((1, 2)).float()
    torch.testing.assert_close(mass, expected)
    torch.testing.assert_close(peak, seen.amax((1, 2)).float())
    arguments = {"places": places, "weights": weights, "scale": 0.25}
    whole, _ = token_mass(query, key, **arguments)
    by_block = block_mass(query, key, block_size=BLOCK, **arguments)
    torch.testing.assert_close(whole.sum(0).view(-1, BLOCK).sum(-1), by_block)


def test_scores_of_tokens_are_kept_only_where_a_request_may_need_them():
    assert state().tokens.arrays().keys() == {"position", "mass", "peak"}
    assert state(granularity="block", request_granularity="server").tokens.arrays() == {}
    fixed = state(policy="streaming", granularity="token", request_policies=["random"])
    assert fixed.tokens.arrays().keys() == {"position"}


def test_reports_of_two_ranks_add_up():
    import numpy as np

    row = ("r", 0, 1, np.array([1]), np.array([0.5]))
    a = ScoreReport(7, {"attention": np.array([1.0, 2.0])}, [row], {"block_mass": 0.1})
    b = ScoreReport(7, {"attention": np.array([0.5, 0.5])}, [row], {"block_mass": 0.2})
    both = a.aggregate(b)
    assert both.scores["attention"].tolist() == [1.5, 2.5]
    assert len(both.graph) == 2
    assert both.scoring_seconds == {"block_mass": 0.2}


def test_what_one_rank_could_not_do_reaches_the_scheduler():
    """Ranks that disagree: a pack that failed on one of them ends the request's evictions, and
    reports of different steps are never added."""
    a, b = ScoreReport(7, {}), ScoreReport(7, {}, pack_failures={"r": "no numbers"})
    assert a.aggregate(b).pack_failures == {"r": "no numbers"}
    with pytest.raises(AssertionError):
        a.aggregate(ScoreReport(8, {}))
