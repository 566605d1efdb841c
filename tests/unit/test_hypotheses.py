"""What a study states is tested on its records, as one family, and told first."""

import math

import numpy as np
import pytest

from harness.analysis.aggregate import CLUSTER_WINDOWS, aggregate, compare
from harness.analysis.hypotheses import ALPHA, CONFIRMED, OPEN, REFUTED, judge
from harness.analysis.perplexity import last_quarter
from harness.analysis.statistics import paired_test
from harness.errors import UsageError
from harness.inputs.windows import ALL_WINDOWS, tile_windows
from harness.records.files import read_json, write_json
from harness.report.change_figure import draw_changes, is_for
from harness.report.experiment import report_experiment
from harness.study.hypotheses import Hypothesis
from harness.study.settings import Study

from .records import record


def runs(shifts, seeds=range(4)):
    """Dense, and methods that are worse by so many nats after the second sum."""
    made = [record("dense", 0.0, seed, 0.0, None) for seed in seeds]
    for method, shift in shifts.items():
        made += [record(method, 0.5, seed, shift, 8) for seed in seeds]
    return made


def judged(hypotheses, **points):
    stated = [Hypothesis.parse(h) for h in hypotheses]
    return judge(stated, [(name, records) for name, records in points.items()])


def test_a_difference_is_confirmed_refuted_or_open():
    better = [{"better": "h2o", "worse": "cab"}]
    (right,) = judged(better, text=runs({"h2o": 0.1, "cab": 0.3}))
    (wrong,) = judged(better, text=runs({"h2o": 0.3, "cab": 0.1}))
    other = [{"better": "h2o", "worse": "tova"}]
    (none,) = judged(other, text=runs({"h2o": 0.1, "tova": 0.1}))
    assert [row["verdict"] for row in (right, wrong, none)] == [CONFIRMED, REFUTED, OPEN]
    assert right["change"] < 0 < wrong["change"]
    assert right["interval"][0] < right["change"] < right["interval"][1] < 0
    assert right["level"] == "s0.5"
    assert right["p_holm"] < ALPHA <= none["p_holm"]


def test_the_family_is_all_differences_of_all_points():
    stated = [{"better": "h2o", "worse": "cab"}, {"method": "h2o", "at_most": {0.5: 0.2}}]
    points = {name: runs({"h2o": 0.1, "cab": 0.3}) for name in ("prose", "code", "novel")}
    rows = judged(stated, **points)
    differences = [row for row in rows if row["limit"] is None]
    assert [row["point"] for row in differences] == list(points)
    assert all(row["p_holm"] == pytest.approx(3 * row["p"]) for row in differences)
    assert all(row["p_holm"] is None for row in rows if row["limit"] is not None)


@pytest.mark.parametrize(("limit", "verdict"), [(0.2, CONFIRMED), (0.05, REFUTED), (0.105, OPEN)])
def test_a_cost_is_judged_by_its_whole_interval(limit, verdict):
    (row,) = judged([{"method": "h2o", "at_most": {0.5: limit}}], text=runs({"h2o": 0.1}))
    assert row["change"] == pytest.approx(0.105, abs=0.002)
    assert row["verdict"] == verdict


def test_what_was_not_measured_is_no_row():
    stated = [{"better": "h2o", "worse": "tova"}, {"method": "h2o", "at_most": {0.9: 0.1}}]
    assert judged(stated, text=runs({"h2o": 0.1})) == []


@pytest.mark.parametrize(
    "wrong",
    [
        "h2o beats cab",
        {"better": "h2o"},
        {"better": "h2o", "worse": 3},
        {"method": "h2o", "at_most": 0.1},
        {"method": "h2o", "at_most": {"half": 0.1}},
        {"method": "h2o", "at_most": {}},
        {"method": 3, "at_most": {0.5: 0.1}},
        {"method": "h2o", "at_most": {0.5: float("nan")}},
        {"method": "h2o", "at_most": {0.5: True}},
        {"better": "h2o", "worse": "h2o"},
    ],
)
def test_what_is_no_hypothesis_is_refused(wrong):
    with pytest.raises(UsageError, match="cannot be read; give one like"):
        Study.parse({"hypotheses": [wrong]})


def test_a_report_begins_with_them(tmp_path):
    for run in runs({"h2o": 0.1, "cab": 0.3}):
        write_json(tmp_path / f"{run['key']}_ctx20_seed{run['seed']}.json", run)
    cost = {"method": "h2o", "at_most": {0.5: 0.2}}
    study = Study.parse({"hypotheses": [{"better": "h2o", "worse": "cab"}, cost]}).to_dict()
    point = {"varied": {}, "folder": "."}
    write_json(tmp_path / "experiment.json", {"study": study, "comparisons": [point]})
    report_experiment(tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "| h2o beats cab | - | 0.5 | -" in page
    assert "| h2o costs at most 20% | - | 0.5 | +" in page
    assert page.index("## Hypotheses") < page.index("## Differences")
    assert read_json(tmp_path / "hypotheses.json")[0]["verdict"] == CONFIRMED


def test_windows_tile_every_document():
    windows = tile_windows([list(range(10)), list(range(3)), list(range(100, 108))], 4)
    assert windows == [
        (0, [0, 1, 2, 3]),
        (4, [4, 5, 6, 7]),
        (13, [100, 101, 102, 103]),
        (17, [104, 105, 106, 107]),
    ]
    with pytest.raises(UsageError, match="fewer than one window of 16"):
        tile_windows([list(range(10))], 16)


def test_all_windows_are_one_run():
    assert Study.parse({"num_samples": ALL_WINDOWS}).num_samples == ALL_WINDOWS
    with pytest.raises(UsageError, match="the same for every seed"):
        Study.parse({"num_samples": ALL_WINDOWS, "seeds": [0, 1]})
    with pytest.raises(UsageError, match="must be at least 1, not 'some'"):
        Study.parse({"num_samples": "some"})


def test_neighbours_that_tile_a_text_are_one_unit():
    """Twenty windows: two clusters, of ten each."""
    made = []
    for method, shift, first in (("dense", 0.0, None), ("h2o", 0.2, 8)):
        several = [record(method, 0.5 * (shift > 0), seed, shift, first) for seed in range(7)]
        one = {**several[0], "windows": []}
        for run in several:
            one["windows"] += run["windows"]
        one["windows"] = one["windows"][:20]
        one["specification"] = {**one["specification"], "num_samples": ALL_WINDOWS}
        made.append(one)
    result = compare([made[0]], [made[1]])["after_eviction"]
    assert (result["num_windows"], result["num_seeds"]) == (20, 20 // CLUSTER_WINDOWS)
    assert result["clustered_t_p"] > result["paired_t_p"]


def test_the_last_quarter_is_told_where_no_sum_spans_its_start():
    window = {"num_predictions": 15, "log_likelihoods": [-4.0, -4.0, -4.0, -6.0]}
    assert last_quarter({**window, "predictions_per_entry": 4}) == 12
    assert last_quarter({**window, "predictions_per_entry": 5}) is None
    run = runs({})[0]
    run = {**run, "windows": [{**run["windows"][0], **window, "predictions_per_entry": 4}]}
    quarter = aggregate([run])["dense_s0.0"]["perplexity_last_quarter"]
    assert quarter["mean"] == pytest.approx(math.exp(2.0))


def test_many_methods_are_drawn_as_rows(tmp_path):
    methods = [f"policy-{n}" for n in range(9)]
    few, many = (
        [(text, aggregate(runs(dict.fromkeys(methods[:n], 0.1)))) for text in ("prose", "code")]
        for n in (3, 9)
    )
    assert not is_for(few)
    assert is_for(many)
    draw_changes(many, tmp_path / "changes", "made up")
    drawn = (tmp_path / "changes.svg").read_text()
    assert all(f"<!-- {name} -->" in drawn for name in (*methods, "prose", "code"))


def test_one_cluster_allows_no_test_and_few_an_interval_of_their_means():
    rng = np.random.default_rng(0)
    base, worse = rng.normal(2, 0.1, 15), rng.normal(2.3, 0.1, 15)
    one = paired_test(base, worse, [0] * 15, neighbours=True)
    assert one["clustered_t_p"] is one["interval_95"] is one["interval_method"] is None
    assert one["paired_t_p"] < 1e-3
    two = paired_test(base, worse, [0] * 8 + [1] * 7, neighbours=True)
    assert two["interval_method"] == "Student's t over clusters"
    assert two["interval_95"][0] < two["mean_difference_nats"] < two["interval_95"][1]
    # Equal and opposite neighbours: no spread between the clusters, so no p to spoil a family with.
    flat = paired_test([0.0] * 16, [1.0, -1.0] * 8, [0] * 8 + [1] * 8, neighbours=True)
    assert flat["clustered_t_p"] is None


def test_methods_without_a_common_window_are_no_row():
    made = [run for run in runs({"h2o": 0.1}) if run["method"] != "dense" and run["seed"] == 0]
    made += [run for run in runs({"cab": 0.1}) if run["method"] != "dense" and run["seed"] == 1]
    assert judged([{"better": "h2o", "worse": "cab"}], text=made) == []


def test_a_hypothesis_about_no_method_of_the_study_says_so():
    study = Study.parse({"hypotheses": [{"better": "h2o", "worse": "streming"}]})
    assert study.without_effect() == [
        "hypothesis {'better': 'h2o', 'worse': 'streming'} is not tested, as streming is no method "
        "of the study"
    ]
