"""Statistics against known answers, by simulation where the answer is a rate."""

import math

import numpy as np
import pytest
from scipy import stats

from harness.analysis.estimate import Estimate
from harness.analysis.statistics import (
    disjoint,
    estimate,
    holm,
    interval,
    mean_interval,
    paired_test,
    ratio_estimate,
)
from harness.inputs.windows import draw_windows

NUM_SIMULATIONS = 2000
SEEDS, WINDOWS = 3, 20
CLUSTERS = np.repeat(np.arange(SEEDS), WINDOWS)


def simulated(shift, seed_effect, rng):
    """Windows of hard and easy text, and a method ``shift`` nats worse on them, [n] each."""
    base = rng.normal(3.0, 0.5, size=SEEDS * WINDOWS)
    effect = seed_effect * rng.normal(size=SEEDS)[CLUSTERS]
    return base, base + shift + effect + rng.normal(0.0, 0.02, size=base.shape)


def rate(count):
    """A share of the simulations, and how far chance may carry it (99.9%)."""
    return count / NUM_SIMULATIONS


def within(share, nominal):
    return abs(share - nominal) < 3.3 * math.sqrt(nominal * (1 - nominal) / NUM_SIMULATIONS)


@pytest.fixture(scope="module")
def no_difference():
    rng = np.random.default_rng(1)
    return [paired_test(*simulated(0.0, 0.0, rng), CLUSTERS) for _ in range(NUM_SIMULATIONS)]


@pytest.mark.parametrize("test", ["paired_t_p", "wilcoxon_p"])
def test_false_positives_come_at_the_nominal_rate(no_difference, test):
    assert within(rate(sum(result[test] < 0.05 for result in no_difference)), 0.05)


def test_a_family_of_no_differences_is_wrong_at_most_at_the_nominal_rate(no_difference):
    p = np.array([result["paired_t_p"] for result in no_difference]).reshape(-1, 10)
    wrong = np.array([min(holm(list(family))) < 0.05 for family in p])
    assert wrong.mean() < 0.05 + 3.3 * math.sqrt(0.05 * 0.95 / len(wrong))
    assert (p.min(axis=1) < 0.05).mean() > 0.3, "uncorrected it would be wrong far more often"


@pytest.mark.parametrize("seed_effect", [0.0, 0.01])
def test_intervals_cover_a_known_difference_at_the_nominal_rate(seed_effect):
    """Also where seeds differ: windows of one seed are not independent then."""
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(NUM_SIMULATIONS):
        first, second = simulated(0.01, seed_effect, rng)
        low, high, method = interval(second - first, CLUSTERS)
        covered += low < 0.01 < high
        assert method == "bootstrap-t over seeds and windows"
    # Bootstrap intervals are nominal to first order only: a percent and a half either way.
    assert abs(rate(covered) - 0.95) < 0.015


def test_intervals_of_one_seed_cover_at_the_nominal_rate():
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(NUM_SIMULATIONS):
        difference = 0.01 + rng.normal(0.0, 0.02, size=WINDOWS)
        low, high, _ = interval(difference, np.zeros(WINDOWS))
        covered += low < 0.01 < high
    assert abs(rate(covered) - 0.95) < 0.015


def test_the_detectable_difference_is_found_four_times_in_five():
    rng = np.random.default_rng(4)
    known = np.random.default_rng(5).normal(0.0, 0.02, size=60)
    detectable = paired_test(np.zeros(60), known)["minimal_detectable_difference"]
    spread = known.std(ddof=1)
    samples = rng.normal(detectable, spread, size=(NUM_SIMULATIONS, 60))
    found = np.count_nonzero(stats.ttest_1samp(samples, 0.0, axis=1).pvalue < 0.05)
    assert within(rate(found), 0.8)


def test_the_t_interval_covers_a_known_difference_at_the_nominal_rate():
    """Of windows that are one sample: a seed only chooses them."""
    rng = np.random.default_rng(6)
    covered = 0
    for _ in range(NUM_SIMULATIONS):
        _, low, high = mean_interval(rng.normal(0.01, 0.02, size=SEEDS * WINDOWS))
        covered += low < 0.01 < high
    assert within(rate(covered), 0.95)


def test_windows_that_share_text_are_tested_once():
    """Three seeds' windows of a text hardly longer than they are: no difference, but for chance in
    every token, is found at the nominal rate in those that share none, and far too often in all."""
    length, per_seed = 8, 40
    size = SEEDS * per_seed * length
    places = [
        place
        for seed in range(SEEDS)
        for place, _ in draw_windows([range(size)], per_seed, length, seed)
    ]
    chosen = disjoint(places, length)
    assert SEEDS * per_seed / 3 < len(chosen) < SEEDS * per_seed
    apart = np.diff(sorted(places[i] for i in chosen))
    assert apart.min() >= length
    rng = np.random.default_rng(7)
    false = {"all": 0, "disjoint": 0}
    for _ in range(NUM_SIMULATIONS):
        sums = np.concatenate(([0.0], np.cumsum(rng.normal(size=size))))
        difference = np.array([sums[place + length] - sums[place] for place in places])
        for name, sample in (("all", difference), ("disjoint", difference[chosen])):
            false[name] += stats.ttest_1samp(sample, 0.0).pvalue < 0.05
    assert within(rate(false["disjoint"]), 0.05)
    assert rate(false["all"]) > 0.08


def test_a_known_difference_is_found():
    result = paired_test(*simulated(0.05, 0.0, np.random.default_rng(0)), CLUSTERS)
    assert result["paired_t_p"] < 1e-6
    assert result["wilcoxon_p"] < 1e-6
    assert result["mean_difference_nats"] == pytest.approx(0.05, abs=0.01)
    assert result["effect_size_dz"] == pytest.approx(0.05 / 0.02, rel=0.25)
    assert 0 < result["interval_95"][0] < 0.05 < result["interval_95"][1]
    assert 0 < result["interval_95_t"][0] < 0.05 < result["interval_95_t"][1]
    assert (result["num_windows"], result["num_seeds"]) == (60, 3)


def test_statistics_repeat_exactly():
    pair = simulated(0.05, 0.0, np.random.default_rng(0))
    assert paired_test(*pair, CLUSTERS) == paired_test(*pair, CLUSTERS)


def test_it_knows_what_it_cannot_say():
    alone = paired_test([1.0], [2.0])
    assert alone["mean_difference_nats"] == 1.0
    for name in ("paired_t_p", "wilcoxon_p", "interval_95", "interval_95_t", "effect_size_dz"):
        assert alone[name] is None
    equal = paired_test([1.0, 2.0], [1.0, 2.0])
    assert equal["paired_t_p"] is equal["wilcoxon_p"] is None
    constant = paired_test([1.0, 2.0, 3.0], [1.5, 2.5, 3.5])
    assert constant["paired_t_p"] is constant["effect_size_dz"] is None
    for first, second in (([1.0], [1.0, 2.0]), ([], [])):
        with pytest.raises(ValueError, match="paired windows"):
            paired_test(first, second)
    with pytest.raises(ValueError, match="2 clusters for 1 windows"):
        paired_test([1.0], [2.0], [0, 1])


def test_few_windows_get_students_interval():
    low, high, method = interval(np.array([0.1, 0.2]), np.array([0, 1]))
    assert method == "Student's t"
    assert (low + high) / 2 == pytest.approx(0.15)
    assert high - low == pytest.approx(2 * 12.706 * 0.05, rel=1e-3)


def test_seeds_of_different_size():
    rng = np.random.default_rng(0)
    clusters = np.array([0] * 4 + [1] * 9 + [2] * 6)
    low, high, method = interval(rng.normal(1.0, 0.1, size=19), clusters)
    assert method == "bootstrap-t over seeds and windows"
    assert low < 1.0 < high


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, None, 0.5]) == [1.0, None, 1.0]
    assert holm([]) == []


def test_an_estimate_tells_spread_and_interval():
    made = estimate([1.0, 3.0])
    assert made["mean"] == 2.0
    assert (made["std"], made["min"], made["max"]) == (math.sqrt(2), 1.0, 3.0)
    assert (made["low"], made["high"]) == mean_interval(np.array([1.0, 3.0]))[1:]
    assert (made["num_runs"], made["interval"]) == (2, "95%, Student's t over seeds")
    assert set(made) == Estimate.__required_keys__
    one = estimate([2.0])
    assert (one["std"], one["low"], one["high"]) == (0.0, 2.0, 2.0)
    assert estimate([None, 1.0]) is None
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_a_ratio_is_paired_and_geometric():
    made = ratio_estimate([(2.0, 1.0), (8.0, 1.0)])
    assert made["mean"] == pytest.approx(4.0)
    assert (made["min"], made["max"]) == (2.0, 8.0)
    assert made["low"] * made["high"] == pytest.approx(16.0)
    assert ratio_estimate([(1.0, 0.0)]) is None
    assert ratio_estimate([]) is None


def test_mean_interval():
    mean, low, high = mean_interval(np.array([1.0, 2.0, 3.0]))
    assert (mean, high - mean) == pytest.approx((2.0, 4.3027 / math.sqrt(3)), rel=1e-4)
    assert low == pytest.approx(2 * mean - high)
    assert mean_interval(np.array([5.0])) == (5.0, 5.0, 5.0)
