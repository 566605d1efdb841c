"""The authors' claims beside what records say of them, from made-up records."""

import pytest
import yaml

from harness.analysis.change import Interval
from harness.analysis.claims import FAILS, HOLDS, OPEN, Limit, memory_share, verdict
from harness.bench.authors_table import authors_table
from harness.errors import UsageError
from harness.records.files import write_json
from harness.study.expectations import EXPECTATIONS

from .records import batch_record, record

WHY_NOT = {claim.method: "another model" for claim in EXPECTATIONS if claim.published != "-"}


@pytest.fixture
def results(tmp_path):
    """H2O costs some 3% at 0.5, CAB some 3%, a little less; H2O alone was served, once at 0.9."""
    for seed in range(6):
        for method, sparsity, shift in (
            ("dense", 0.0, None),
            ("h2o", 0.5, 0.03),
            ("cab", 0.5, 0.029),
            ("streaming", 0.5, 0.2),
            ("h2o-blocks", 0.5, 0.06),
        ):
            made = record(method, sparsity, seed, shift or 0.0, None if shift is None else 8)
            write_json(tmp_path / "prose" / f"{made['key']}_seed{seed}.json", made)
    runs = [("h2o", 0.5, seed, 210.0 + seed) for seed in (0, 1)]
    runs += [("stock", 0.0, seed, 100.0) for seed in (0, 1)] + [("h2o", 0.9, 0, 900.0)]
    for run in runs:
        made = batch_record(*run)
        write_json(tmp_path / "speed" / f"{made['key']}_seed{made['seed']}.json", made)
    return tmp_path


def table(results, *rows, **parts):
    path = results / "authors.yaml"
    stated = {"rows": list(rows), "not_comparable": WHY_NOT, **parts}
    path.write_text(yaml.safe_dump(stated))
    return authors_table(path)


def cells(made, name, sparsity):
    """A row's cells by their column's title, in the table of a sparsity."""
    lines = made.split(f"Sparsity {sparsity:g}:\n\n")[1].split("\n\n")[0].splitlines()
    (row,) = (line for line in lines if line.startswith(f"| {name} "))
    titles, values = ([c.strip() for c in line.strip("|").split(" | ")] for line in (lines[0], row))
    return dict(zip(titles, values, strict=True))


PROSE = {"measure": "perplexity", "name": "prose", "records": "prose"}


@pytest.mark.parametrize(
    ("low", "high", "at_most", "at_least"),
    [
        (1.0, 1.5, HOLDS, FAILS),
        (1.0, 3.0, OPEN, OPEN),
        (2.5, 3.0, FAILS, HOLDS),
        (2.0, 2.0, HOLDS, HOLDS),
        (None, None, OPEN, OPEN),
    ],
)
def test_a_claim_is_judged_by_the_whole_interval(low, high, at_most, at_least):
    measured = Interval(1.9, low, high)
    assert verdict(measured, Limit(2.0)) == at_most
    assert verdict(measured, Limit(2.0, at_least=True)) == at_least


def test_perplexity_is_judged_against_what_each_method_was_expected_to_cost(results):
    row = cells(table(results, PROSE), "prose", 0.5)
    assert row["H2O"].startswith("+3.0% [")
    assert row["H2O"].endswith(", holds"), "at most 4%"
    assert row["CAB"].endswith(", does not hold"), "at most 2.5%"
    assert row["CAB against H2O"].endswith(", holds")
    assert row["StreamingLLM"].startswith("+22.1% [")
    assert not row["StreamingLLM"].endswith(("holds", "hold", "open")), "nothing was expected"


def test_a_row_may_name_its_methods_and_shows_no_other(results):
    blocks = {**PROSE, "name": "blocks", "methods": {"h2o": "h2o-blocks"}}
    row = cells(table(results, blocks), "blocks", 0.5)
    assert row["H2O"].endswith(", does not hold")
    assert (row["CAB"], row["StreamingLLM"], row["CAB against H2O"]) == ("-", "-", "-")


def test_what_was_not_measured_at_a_sparsity_has_no_row(results):
    assert "| prose |" not in table(results, PROSE).split("Sparsity 0.9:\n\n")[1].split("\n\n")[0]


def test_memory_is_exact_and_throughput_of_one_run_decides_nothing(results):
    speed = {"measure": "output throughput", "name": "served", "records": "speed"}
    memory = {"measure": "peak KV memory", "name": "held", "records": "prose"}
    made = table(results, speed, memory)
    assert cells(made, "held", 0.5)["H2O"] == "50.0%, holds"
    assert cells(made, "served", 0.5)["H2O"].startswith("2.10x [")
    assert cells(made, "served", 0.5)["H2O"].endswith(", holds")
    assert cells(made, "served", 0.9)["H2O"] == "9.00x, open"
    assert "m, 4 x (8 + 12), block 1, default memory, 2 seed(s)" in made


def test_memory_of_several_runs_is_judged_by_the_worst():
    runs = [
        record(method, s, seed, 0.0, None)
        for seed in (0, 1)
        for method, s in (("dense", 0.0), ("h2o", 0.5))
    ]
    runs[-1]["peak_memory_mib"] = 6.0
    share = memory_share(runs, "peak KV memory", "h2o", "s0.5")
    assert (share.low, share.high) == (0.5, 0.6)
    assert verdict(share, Limit(0.5)) == OPEN


def test_what_was_published_is_compared_with_nothing_and_says_why(results):
    made = table(results, PROSE)
    assert made.count("not comparable: another model") == len(WHY_NOT)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"not_comparable": {}}, "lacks h2o under not_comparable"),
        ({"rows": [{"measure": "perplexity"}]}, "is no row; give measure, name, records"),
        ({"rows": [{**PROSE, "measure": "speed"}]}, "'speed' is no measure; choose from"),
        ({"rows": [{**PROSE, "methods": {"tova": "tova"}}]}, "claimed anything about 'tova'"),
        ({"rows": [{**PROSE, "records": "poems"}]}, "holds no run record"),
        ({"why": {"luck": "none"}}, "why of 'luck'"),
        ({"verdict": "holds"}, "has 'verdict'; it takes rows"),
    ],
)
def test_a_wrong_file_is_told_in_a_sentence(results, changed, told):
    rows = changed.pop("rows", [PROSE])
    with pytest.raises(UsageError, match=told):
        table(results, *rows, **changed)
