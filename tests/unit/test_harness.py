"""Windows, perplexity, statistics, aggregation: pure parts of the benchmark."""

import itertools
import math
import re
from pathlib import Path

import pytest

from harness.analysis.aggregate import aggregate, significance
from harness.analysis.estimate import Estimate
from harness.analysis.perplexity import after_eviction, by_chunk, perplexity, total
from harness.bench.readme import fill
from harness.errors import UsageError
from harness.inputs.windows import draw_windows
from harness.records.files import read_json, write_json
from harness.study.plan import seeds_for

from .records import experiment

ROOT = Path(__file__).resolve().parents[2]


def test_windows_repeat_by_seed_and_never_overlap():
    tokens = list(range(1000))
    first = draw_windows([tokens], 7, 100, seed=3)
    assert first == draw_windows([tokens], 7, 100, seed=3)
    assert first != draw_windows([tokens], 7, 100, seed=4)
    starts = [start for start, _ in first]
    assert all(b - a >= 100 for a, b in itertools.pairwise(starts))
    assert all(window == tokens[start : start + 100] for start, window in first)


def test_windows_cover_the_text():
    seen = {t for seed in range(200) for _, w in draw_windows([range(300)], 2, 50, seed) for t in w}
    assert seen == set(range(300))


def test_a_text_that_is_just_long_enough_is_used_up():
    assert [s for s, _ in draw_windows([range(300)], 3, 100, seed=0)] == [0, 100, 200]


def test_a_text_too_short_says_so_with_the_numbers():
    with pytest.raises(UsageError, match=r"299 tokens, but 3 windows of 100 need 300"):
        draw_windows([range(299)], 3, 100, seed=0)


def test_perplexity_of_a_fair_die():
    window = by_chunk([math.log(1 / 6)] * 5, 2)
    assert len(window["log_likelihoods"]) == 3
    assert perplexity([total(window)]) == pytest.approx(6.0, rel=1e-4)
    with pytest.raises(ValueError, match="no predictions"):
        perplexity([])


def test_after_eviction_starts_with_the_first_query_that_saw_less():
    # 4 tokens processed when blocks went: the query at token 4 predicts token 5, entry 4.
    window = by_chunk([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], 2)
    assert after_eviction([window], [4]) == [(9.0, 2)]
    assert after_eviction([window, window], [None, 6]) == [], "no eviction, nothing after it"
    with pytest.raises(ValueError, match="inside a sum"):
        total(window, 3)


@pytest.fixture
def records():
    return experiment()


def test_aggregate_has_the_documented_keys(records):
    results = aggregate(records)
    assert list(results) == ["dense_s0.0", "h2o_s0.9", "cab_s0.9", "cab_s0.5"]
    entry = results["h2o_s0.9"]
    assert (entry["method"], entry["sparsity"], entry["num_runs"]) == ("h2o", 0.9, 2)
    for metric in (
        "perplexity",
        "perplexity_after_eviction",
        "tokens_per_second",
        "peak_memory_mib",
        "avg_cache_size",
    ):
        assert set(entry[metric]) == Estimate.__required_keys__
    assert results["dense_s0.0"]["perplexity_after_eviction"] is None
    # Only the tokens after the first eviction were shifted, by 0.3 nats.
    ratio = entry["perplexity_after_eviction"]["mean"] / entry["dense_after_eviction"]["mean"]
    assert ratio == pytest.approx(math.exp(0.3), rel=0.01)


def test_significance_pairs_the_same_windows(records):
    tests = significance(records)
    assert set(tests) == {
        "h2o_vs_cab_s0.9",
        "dense_vs_h2o_s0.9",
        "dense_vs_cab_s0.9",
        "dense_vs_cab_s0.5",
    }
    after = tests["h2o_vs_cab_s0.9"]["after_eviction"]
    assert after["num_windows"] == 6
    assert after["mean_difference_nats"] == pytest.approx(-0.1, abs=0.01)  # cab is better
    assert tests["dense_vs_h2o_s0.9"]["after_eviction"]["mean_difference_nats"] == pytest.approx(
        0.3, abs=0.01
    )


def test_records_are_json_without_nan(tmp_path):
    write_json(tmp_path / "deep" / "a.json", {"x": 1.5})
    assert read_json(tmp_path / "deep" / "a.json") == {"x": 1.5}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "b.json", {"x": math.nan})
    assert not (tmp_path / "b.json").exists()


def test_lists_of_numbers_take_one_line(tmp_path):
    value = {"a": [1.5, -2e-05, 3], "b": ["x", "y"], "c": [[1, 2], [3]], "d": "[1,\n 2]"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert '"a": [ 1.5, -2e-05, 3 ]' in (tmp_path / "a.json").read_text()


@pytest.mark.parametrize(("name", "num_tables"), [("README.md", 2), ("results/README.md", 97)])
def test_the_readmes_tables_are_made_from_the_records(name, num_tables):
    text = (ROOT / name).read_text()
    assert fill(text, ROOT / "results") == text, "run scripts/readme_tables"
    assert text.count("<!-- end -->") == num_tables


def test_the_readme_is_read_in_five_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_links_between_pages_lead_somewhere():
    folders = (".", "harness", "harness/client", "results", "scripts", "tests", "vllm_plugins")
    pages = [page for folder in folders for page in (ROOT / folder).glob("*.md")]
    pages += (ROOT / "results").rglob("report.md")
    assert len(pages) > 20
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page}: {target}"


def test_seeds():
    assert seeds_for(None, None) == (0,)
    assert seeds_for(3, None) == (0, 1, 2)
    assert seeds_for(None, [5, 7]) == (5, 7)
    for num_runs, seeds in ((3, [1]), (None, [1, 1]), (None, [-1])):
        with pytest.raises(UsageError):
            seeds_for(num_runs, seeds)
