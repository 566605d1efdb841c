"""Windows, perplexity, statistics, aggregation: pure parts of the benchmark."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from harness.aggregate import aggregate, significance
from harness.corpora import load_text
from harness.errors import UsageError
from harness.perplexity import after_eviction, by_chunk, perplexity, total
from harness.readme import fill
from harness.records import provenance, read_json, write_json
from harness.report import markdown_table, plot_perplexity, text_table
from harness.specification import EngineSpecification, runs_for, seeds_for
from harness.statistics import paired_test, summary
from harness.workload import draw_windows
from vllm_plugins.config import EvictionConfig, EvictionConfigError


def test_windows_repeat_by_seed_and_never_overlap():
    tokens = list(range(1000))
    first = draw_windows(tokens, 7, 100, seed=3)
    assert first == draw_windows(tokens, 7, 100, seed=3)
    assert first != draw_windows(tokens, 7, 100, seed=4)
    starts = [start for start, _ in first]
    assert all(b - a >= 100 for a, b in itertools.pairwise(starts))
    assert all(window == tokens[start : start + 100] for start, window in first)


def test_windows_cover_the_text():
    seen = {t for seed in range(200) for _, w in draw_windows(range(300), 2, 50, seed) for t in w}
    assert seen == set(range(300))


def test_a_text_that_is_just_long_enough_is_used_up():
    assert [s for s, _ in draw_windows(range(300), 3, 100, seed=0)] == [0, 100, 200]


def test_a_text_too_short_says_so_with_the_numbers():
    with pytest.raises(UsageError, match=r"299 tokens, but 3 windows of 100 need 300"):
        draw_windows(range(299), 3, 100, seed=0)


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


def test_summary():
    assert summary([1.0, 3.0]) == {"mean": 2.0, "std": math.sqrt(2), "min": 1.0, "max": 3.0}
    assert summary([2.0])["std"] == 0.0
    assert summary([None, 1.0]) is None
    with pytest.raises(ValueError, match="no values"):
        summary([])


def test_paired_test_finds_a_shift_and_no_shift():
    rng = np.random.default_rng(0)
    base = rng.normal(3.0, 0.5, size=30)
    shifted = paired_test(base, base + rng.normal(0.05, 0.02, size=30))
    assert shifted["paired_t_p"] < 1e-6
    assert shifted["wilcoxon_p"] < 1e-4
    low, high = shifted["interval_95"]
    assert low < 0.05 < high
    assert low > 0
    same = paired_test(base, base + rng.normal(0.0, 0.02, size=30))
    assert same["paired_t_p"] > 0.01


def test_paired_test_knows_what_it_cannot_say():
    alone = paired_test([1.0], [2.0])
    assert alone["mean_difference_nats"] == 1.0
    assert alone["paired_t_p"] is alone["wilcoxon_p"] is alone["interval_95"] is None
    equal = paired_test([1.0, 2.0], [1.0, 2.0])
    assert equal["paired_t_p"] is None
    with pytest.raises(ValueError, match="paired windows"):
        paired_test([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="paired windows"):
        paired_test([], [])


def record(method, sparsity, seed, shift, first_eviction):
    rng = np.random.default_rng(seed)
    windows = []
    for start in (0, 100, 200):
        likelihoods = -rng.random(20)
        if first_eviction is not None:
            likelihoods[first_eviction:] -= shift
        windows.append(
            {
                "start": start,
                "eviction": {"first_eviction_tokens": first_eviction},
                **by_chunk(likelihoods.tolist(), 4),
            }
        )
    evicted = after_eviction(windows, [first_eviction] * len(windows))
    return {
        "key": f"{method}_s{sparsity:g}",
        "method": method,
        "sparsity": sparsity,
        "seed": seed,
        "perplexity": perplexity(map(total, windows)),
        "perplexity_after_eviction": perplexity(evicted) if evicted else None,
        "tokens_per_second": 100.0,
        "peak_memory_mb": 10.0,
        "avg_cache_size": 5.0,
        "windows": windows,
    }


@pytest.fixture
def records():
    return [
        made
        for seed in (0, 1)
        for made in (
            record("dense", 0.0, seed, 0.0, None),
            record("h2o", 0.9, seed, 0.3, 8),
            record("cab", 0.9, seed, 0.2, 8),
            record("cab", 0.5, seed, 0.1, 12),
        )
    ]


def test_aggregate_has_the_documented_keys(records):
    results = aggregate(records)
    assert list(results) == ["dense_s0", "h2o_s0.9", "cab_s0.9", "cab_s0.5"]
    entry = results["h2o_s0.9"]
    assert (entry["method"], entry["sparsity"], entry["num_runs"]) == ("h2o", 0.9, 2)
    for metric in (
        "perplexity",
        "perplexity_after_eviction",
        "tokens_per_second",
        "peak_memory_mb",
        "avg_cache_size",
    ):
        assert set(entry[metric]) == {"mean", "std", "min", "max"}
    assert results["dense_s0"]["perplexity_after_eviction"] is None
    # Only the tokens after the first eviction were shifted, by 0.3 nats.
    ratio = entry["perplexity_after_eviction"]["mean"] / entry["dense_after_eviction"]["mean"]
    assert ratio == pytest.approx(math.exp(0.3))


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
    assert after["mean_difference_nats"] == pytest.approx(-0.1)  # cab is better
    assert tests["dense_vs_h2o_s0.9"]["after_eviction"]["mean_difference_nats"] == pytest.approx(
        0.3
    )


def test_tables_and_figure(records, tmp_path):
    results = aggregate(records)
    assert "+" in text_table(results)
    assert markdown_table(results).count("\n") == 1 + len(results)
    plot_perplexity(results, tmp_path / "figure.png", "made up")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


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


def test_the_readmes_tables_are_made_from_the_records():
    root = Path(__file__).resolve().parents[2]
    text = (root / "README.md").read_text()
    assert fill(text, root / "results") == text, "run scripts/readme_tables"
    assert text.count("<!-- table: ") >= 2


def test_provenance_names_versions_and_hardware():
    source = provenance()
    assert "torch" in source["versions"]
    assert source["hardware"]["cores"] >= 1
    json.dumps(source)


def engine(**settings):
    config = EvictionConfig.parse({"policy": "dense", **settings})
    return EngineSpecification("m", 1024, 64, 32, 8, config.to_dict())


def test_runs_of_a_comparison():
    runs = runs_for(engine(), ["dense", "h2o"], ["0.5", 0.9], "t", 4, (0, 1))
    names = [run.file_name for run in runs]
    keys = ("dense_s0", "h2o_s0.5", "h2o_s0.9")
    assert names == [f"{key}_ctx1024_seed{seed}.json" for seed in (0, 1) for key in keys]
    with pytest.raises(EvictionConfigError, match="unknown policy"):
        runs_for(engine(), ["h20"], [0.5], "t", 4, (0,))
    with pytest.raises(EvictionConfigError, match=r"kv_sparsity is '1\.0'"):
        runs_for(engine(), ["h2o"], ["1.0"], "t", 4, (0,))


def test_seeds():
    assert seeds_for(None, None) == (0,)
    assert seeds_for(3, None) == (0, 1, 2)
    assert seeds_for(None, [5, 7]) == (5, 7)
    for num_runs, seeds in ((3, [1]), (None, [1, 1]), (None, [-1])):
        with pytest.raises(UsageError):
            seeds_for(num_runs, seeds)


def test_texts(tmp_path, canterbury):
    assert len(canterbury) > 550_000
    assert "librarian" in canterbury.lower()
    assert "White Rabbit" in canterbury
    (tmp_path / "a.txt").write_text("words")
    assert load_text(f"text:{tmp_path}/a.txt") == "words"
    with pytest.raises(UsageError, match="cannot read"):
        load_text(f"text:{tmp_path}/b.txt")


def test_any_dataset_that_datasets_can_load(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = [{"text": "one"}, {"text": "two"}]
    (folder / "test.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert load_text(str(folder)) == "one\n\ntwo"
    (folder / "test.jsonl").write_text(json.dumps({"body": "x"}))
    with pytest.raises(UsageError, match="no column 'text'"):
        load_text(str(folder))
    with pytest.raises(UsageError, match="datasets cannot load"):
        load_text(str(tmp_path / "nothing"))
