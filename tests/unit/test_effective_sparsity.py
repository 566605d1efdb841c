"""Where another sparsity is in effect than was asked for: tables, comparisons and figures."""

import copy
import re
from pathlib import Path

import pytest

from harness.analysis.aggregate import aggregate
from harness.analysis.curves import curves
from harness.records.files import read_json
from harness.records.former_names import in_todays_names
from harness.records.specifications import order
from harness.records.stored import read_records
from harness.report import figures
from harness.report.expectations import expectation_rows
from harness.report.tables import markdown_table
from harness.report.terminal import text_table

from .records import experiment, record

RESULTS = Path(__file__).resolve().parents[2] / "results"


@pytest.fixture(scope="module")
def records():
    return sorted(experiment(), key=order)


def less_effective(records, **engine):
    """The same records with other engine settings in their specification."""
    changed = copy.deepcopy(records)
    for entry in changed:
        specification = entry["specification"]
        specification["engine"] = {**specification["engine"], **engine}
        del entry["kind"]  # what heads say follows from the specification then
    return [in_todays_names(entry) for entry in changed]


def test_a_run_stands_beside_what_was_expected_of_its_effective_sparsity_alone(records):
    # Blocks of 2: of 10, three stay at 0.9 and five at 0.5.
    eviction = {**records[0]["specification"]["engine"]["eviction"], "min_blocks": 3}
    results = aggregate(less_effective(records, block_size=2, eviction=eviction))
    assert results["cab_s0.9"]["effective_sparsity"] == pytest.approx(0.7)
    _, h2o, cab = expectation_rows(results, "")
    left_out = "0.9 (effective 0.7): left out, nothing was expected at this sparsity"
    assert h2o[4] == left_out
    assert re.fullmatch(rf"0\.5: perplexity [^;]+; {re.escape(left_out)}", cab[4])
    budget = record("h2o", 0.0, 0, 0.1, 8)
    budget["specification"]["budget_tokens"] = 2
    del budget["kind"]
    results = aggregate([in_todays_names(budget)])
    ((_, _, _, _, measured, _),) = expectation_rows(results, "")[1:]
    assert measured.startswith("2 tokens (effective 0.9): perplexity")


def test_old_records_are_read_for_what_was_in_effect():
    """Those kept in ``results`` do not say it; their README table stays as it was."""
    folder = RESULTS / "wikitext-1024"
    results = aggregate(read_records(folder))
    assert "effective_sparsity" not in read_json(folder / "h2o_s0.9_ctx1024_seed0.json")
    assert results["h2o_s0.9"]["effective_sparsity"] == 0.875
    assert "effective" in text_table(results).splitlines()[0]
    assert "effective" not in markdown_table(results)
    oldest = read_json(RESULTS / "defaults" / "g1-sum-all" / "h2o_s0.9_ctx2048_seed0.json")
    assert in_todays_names(oldest)["effective_sparsity"] == 1 - 7 / 64


def test_figures_place_a_run_at_its_effective_sparsity(records, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.update({path.name: figure}))
    changed = less_effective(records, block_size=5)  # of 4 blocks at least 2 stay
    results = aggregate(changed)
    figures.draw(tmp_path, results, {}, curves(changed, results), "made up")
    (axes,) = drawn["perplexity"].axes
    assert axes.get_xlabel().startswith("effective sparsity")
    places = [x for container in axes.containers for x in container.lines[0].get_xdata()]
    assert places == [pytest.approx(0.5, abs=0.02)] * 3
