"""Every policy honours one contract; each policy keeps what its definition says."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_plugins.policies import (
    CHANCE,
    GRAPH,
    Policy,
    PolicyParameterError,
    TokenRule,
    by_peak,
    by_score,
    chance,
    check_kept,
    get_policy,
    keep_highest,
    policy_names,
)
from vllm_plugins.policies.cab import by_median, cab
from vllm_plugins.policies.forman import attention_graph, augmented_forman_curvature
from vllm_plugins.policies.h2o import h2o
from vllm_plugins.policies.key_norm import key_norm
from vllm_plugins.policies.random import random
from vllm_plugins.policies.select import top
from vllm_plugins.policies.streaming import streaming

EVICTING = [name for name in policy_names() if get_policy(name).select is not None]
CASES = [(name, {}) for name in EVICTING] + [("cab", {"bridge_definition": "forman"})]


def call(name, overrides, scores, positions, keep, sinks, seed=0):
    policy = get_policy(name)
    parameters = policy.resolve(overrides)
    needs = policy.needed(parameters)
    extra = {}
    if CHANCE in needs:
        extra["chance"] = chance(positions, seed)
    if GRAPH in needs:
        extra["graph"] = np.tril(np.random.default_rng(seed).random((len(scores),) * 2))
    return policy.select(
        scores,
        positions,
        keep,
        num_sink_blocks=sinks,
        **extra,
        **policy.block_parameters(parameters),
    )


@st.composite
def states(draw):
    n = draw(st.integers(5, 60))
    gaps = draw(st.lists(st.integers(1, 4), min_size=n, max_size=n))
    positions = np.cumsum(gaps) - gaps[0]
    value = st.floats(0, 100) | st.just(0.0)  # zeros make ties
    scores = np.array(draw(st.lists(value, min_size=n, max_size=n)))
    sinks = draw(st.integers(0, 3))
    keep = draw(st.integers(sinks + 1, n - 1))
    return scores, positions, keep, sinks


@pytest.mark.parametrize(("name", "overrides"), CASES, ids=lambda value: str(value))
@given(state=states())
@settings(max_examples=60, deadline=None)
def test_contract(name, overrides, state):
    scores, positions, keep, sinks = state
    before = scores.copy()
    kept = call(name, overrides, scores, positions, keep, sinks)
    check_kept(kept, positions, keep, sinks)
    assert len(kept) == keep, "the whole budget is used"
    assert np.array_equal(scores, before), "a pure function leaves its input alone"
    again = call(name, overrides, scores, positions, keep, sinks)
    assert np.array_equal(kept, again), "the same input gives the same answer"


@pytest.mark.parametrize(("name", "overrides"), CASES, ids=lambda value: str(value))
def test_a_budget_that_fits_keeps_everything(name, overrides):
    kept = call(name, overrides, np.ones(6), np.arange(6), 6, 1)
    assert kept.tolist() == list(range(6))


@given(state=states())
@settings(max_examples=60, deadline=None)
def test_h2o_keeps_the_heaviest(state):
    scores, positions, keep, sinks = state
    kept = h2o(scores, positions, keep, num_sink_blocks=sinks)
    evicted = np.setdiff1d(np.arange(len(scores)), kept)
    num_sinks = np.searchsorted(positions, sinks)
    recent = min(max(1, round(0.2 * keep)), keep - num_sinks)
    heavy = [i for i in kept if num_sinks <= i < len(scores) - recent]
    if heavy:
        assert scores[heavy].min() >= scores[evicted].max()


def test_h2o_by_hand():
    scores = np.array([1.0, 9.0, 2.0, 8.0, 3.0, 7.0, 0.0, 0.0, 0.0, 0.0])
    kept = h2o(scores, np.arange(10), 5, num_sink_blocks=1)
    assert kept.tolist() == [0, 1, 3, 5, 9]  # sink, three heaviest, one recent (20% of 5)


def test_cab_by_hand_median():
    # Of 10: local 17-19 (30%), the sink and the four heaviest, 1-4 (50%), two bridges (20%).
    scores = np.array([5, 90, 80, 70, 60, 1, 2, 3, 10, 11, 12, 13, 40, 41, 42, 43, 44, 0, 0, 0.0])
    kept = cab(scores, np.arange(20), 10, num_sink_blocks=1)
    # Left are 5-16; of their 12 scores the upper median is 13, and 12 lies next to it.
    assert kept.tolist() == [0, 1, 2, 3, 4, 10, 11, 17, 18, 19]


def test_cab_forman_keeps_the_block_that_joins_two_clusters():
    # Blocks 1-4 attend to one another, 6-9 likewise; 5 hangs between them. Recent: 10-12.
    n = 13
    mass = np.zeros((n, n))
    for cluster in ((1, 2, 3, 4), (6, 7, 8, 9)):
        for i in cluster:
            for j in cluster:
                if j < i:
                    mass[i, j] = 1.0
    mass[5, 4] = mass[6, 5] = 1.0
    curvature = augmented_forman_curvature(attention_graph(mass))
    assert np.argmin(curvature) == 5
    scores = np.zeros(n)
    scores[[1, 2, 6]] = 5.0
    shares = {"local": 0.3, "bridge": 0.2, "importance": 0.5}
    kept = cab(
        scores,
        np.arange(n),
        8,
        num_sink_blocks=1,
        bridge_definition="forman",
        graph=mass,
        **shares,
    )
    assert 5 in kept
    assert {0, 1, 2, 6} <= set(kept.tolist())


@pytest.mark.parametrize(
    ("edges", "n", "expected"),
    [
        ([(0, 1), (1, 2)], 3, [1.0, 1.0, 1.0]),  # path: each edge 4 - 1 - 2
        ([(0, 1), (1, 2), (0, 2)], 3, [3.0, 3.0, 3.0]),  # triangle: 4 - 2 - 2 + 3
        ([(0, 1), (0, 2), (0, 3), (0, 4)], 5, [-1.0, -1.0, -1.0, -1.0, -1.0]),  # star: 4 - 4 - 1
        ([], 2, [np.inf, np.inf]),
    ],
)
def test_forman_curvature_of_known_graphs(edges, n, expected):
    adjacency = np.zeros((n, n), dtype=bool)
    for u, v in edges:
        adjacency[u, v] = adjacency[v, u] = True
    assert augmented_forman_curvature(adjacency).tolist() == expected


def test_attention_graph_ignores_the_diagonal_and_is_symmetric():
    mass = np.array([[9.0, 0, 0], [1.0, 9.0, 0], [3.0, 1.0, 9.0]])
    graph = attention_graph(mass)
    assert graph.tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    # Row 1 has one predecessor, which cannot exceed its own mean.


def test_streaming_keeps_sinks_and_the_most_recent():
    kept = streaming(np.zeros(10), np.arange(10), 4, num_sink_blocks=1)
    assert kept.tolist() == [0, 7, 8, 9]


def test_key_norm_evicts_the_lowest_ratio():
    scores = np.array([0.0, 5.0, 1.0, 4.0, 2.0, 3.0])
    kept = key_norm(scores, np.arange(6), 4, num_sink_blocks=1, recent=0.0)
    assert kept.tolist() == [0, 1, 3, 5]


def test_random_is_uniform_outside_its_protected_blocks():
    hits = np.zeros(12)
    for seed in range(4000):
        drawn = chance(np.arange(12), seed)
        hits[random(np.zeros(12), np.arange(12), 6, num_sink_blocks=1, chance=drawn)] += 1
    assert hits[0] == hits[11] == 4000
    share = hits[1:11] / 4000  # 4 of 10
    assert np.all(np.abs(share - 0.4) < 0.04)


def test_ties_go_to_the_recent_blocks():
    assert top(np.zeros(6), 2).tolist() == [4, 5]
    kept = keep_highest(np.zeros(6), np.arange(6), 3, num_sink_blocks=1, num_recent_blocks=1)
    assert kept.tolist() == [0, 4, 5]


def test_shapes_that_disagree_raise():
    with pytest.raises(ValueError, match="priorities"):
        keep_highest(np.zeros(3), np.arange(4), 2, num_sink_blocks=0, num_recent_blocks=1)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([0, 1, 2, 5], "budget"),
        ([0, 5, 5], "repeats"),
        ([0, 1, 4], "last block"),
        ([1, 4, 5], "sink"),
        ([], "ascending"),
        ([[0, 5]], "1-D"),
        ([0.0, 5.0], "1-D"),
    ],
)
def test_a_broken_policy_is_caught(kept, message):
    with pytest.raises(ValueError, match=message):
        check_kept(np.array(kept, dtype=None if kept else int), np.arange(6), 3, 1)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("h2o", {"recent": 0.5}, "sum to 1"),
        ("cab", {"local": 0.5}, "sum to 1"),
        ("cab", {"local": -0.1, "bridge": 0.6}, "at least 0"),
        ("cab", {"bridge_definition": "ricci"}, "median, forman"),
        ("h2o", {"recnet": 0.2}, "recent"),
        ("h2o", {"recent": "0.2"}, "float"),
        ("random", {"recent": 1.5}, "0 to 1"),
    ],
)
def test_bad_parameters_are_refused(name, overrides, message):
    with pytest.raises(PolicyParameterError, match=message):
        get_policy(name).resolve(overrides)


def test_unknown_policy_names_the_known_ones():
    with pytest.raises(PolicyParameterError, match=r"'h20'.*h2o, cab, streaming"):
        get_policy("h20")


def test_needs_follow_the_parameters():
    policy = get_policy("cab")
    assert GRAPH not in policy.needed(policy.resolve())
    assert GRAPH in policy.needed(policy.resolve({"bridge_definition": "forman"}))


def test_dense_has_nothing_to_select():
    assert isinstance(get_policy("dense"), Policy)
    assert get_policy("dense").select is None


def test_policies_and_statistics_import_neither_vllm_nor_torch():
    code = (
        "import sys, vllm_plugins, vllm_plugins.policies, vllm_plugins.config,"
        " vllm_plugins.ledger, harness.analysis.statistics, harness.analysis.perplexity,"
        " harness.cli;"
        "bad = {'vllm', 'torch'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_token_rule_brings_the_needs_of_its_rankings():
    assert TokenRule(recent=0.2, ranked=((by_score, 1.0),)).needs == {"token_mass"}
    assert TokenRule(recent=0.2, ranked=((by_peak, 1.0),)).needs == {"token_mass", "token_peak"}
    assert TokenRule(recent=0.2, ranked=((lambda tokens, left: left, 1.0),)).needs == set()


@pytest.mark.parametrize(
    "values",
    [
        {"ranked": ()},
        {"ranked": ((by_score, 1.5),)},
        {"ranked": ((by_score, float("nan")),)},
        {"selection": "heads"},
        {"needs": frozenset({"attention"})},
    ],
)
def test_a_token_rule_that_is_none_is_refused(values):
    values = {"recent": 0.2, "ranked": ((by_score, 1.0),), **values}
    with pytest.raises(ValueError):  # noqa: PT011, the sentence reaches users through `require`
        TokenRule(**values)
    policy = Policy(name="odd", tokens=lambda parameters: TokenRule(**values))
    with pytest.raises(PolicyParameterError, match="policy odd"):
        policy.require("token", {})


def test_bridges_by_median_are_closest_to_the_median_of_what_is_left():
    class Tokens:
        score = np.array([[[[9.0, 1.0, 4.0, 5.0, 8.0]]]])

    left = np.array([[[[False, True, True, True, True]]]])
    ranks = by_median(Tokens, left)[0, 0, 0]
    assert ranks.argmax() == 3  # 5 is the upper median of 1, 4, 5 and 8
    assert ranks[2] == -1.0
