"""What goes wrong with numbers, files and disks during a sweep, and what a report makes of it."""

import json
import math
import os
import shutil

import pytest

from harness.cli import main
from harness.records.files import read_json

from .made_up_engine import SETTINGS, made_up_engines, made_up_text

H2O = "h2o_s0.5_ctx256_seed0.json"
NUM_RUNS = 2 * 2 * 2


@pytest.fixture(scope="module")
def engines(smollm2):
    with made_up_engines() as made:
        yield made


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "study.yaml"
    settings = {**SETTINGS, "methods": ["dense", "h2o"], "dataset": made_up_text(path.parent)}
    path.write_text(json.dumps(settings))
    return path


def arguments(study, folder):
    return ["offline", "--study", str(study), "--output-dir", str(folder)]


@pytest.fixture(scope="module")
def finished(engines, study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    assert main([*arguments(study, folder), "--experiment-name", "e"]) == 0
    return folder / "e"


@pytest.fixture
def experiment(finished, tmp_path):
    """A finished experiment, to be damaged."""
    return shutil.copytree(finished, tmp_path / "e")


@pytest.fixture
def offline(engines, study, tmp_path):
    """Runs the command on the made-up engine, into ``tmp_path / "e"``."""
    engines.runs, engines.started, engines.at_run = 0, 0, {}

    def command(*flags):
        return main([*arguments(study, tmp_path), "--experiment-name", "e", *flags])

    command.folder = tmp_path / "e"
    return command


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def leftovers(folder):
    return [path.name for path in folder.rglob(".*")]


def full_disk(path):
    """Make ``path`` unwritable as a full disk does: the kernel says so when it is flushed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f".{path.name}.{os.getpid()}").symlink_to("/dev/full")


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_log_prob_that_is_no_number_fails_its_run_only(offline, engines, value, capsys):
    engines.at_run = {2: value}
    assert offline() == 1
    (failed,) = (offline.folder / "failed").glob("*.json")
    reason = read_json(failed)["reason"]
    assert "the log-prob of token 10 of the window at" in reason
    assert f"is {value}" in reason
    assert len(list(offline.folder.glob("*_ctx256_*.json"))) == NUM_RUNS - 1
    assert reason in capsys.readouterr().err
    assert engines.started == 2, "the cache may hold what made the number"
    assert offline() == 0
    assert not list((offline.folder / "failed").glob("*.json"))


def test_an_unscored_log_prob_may_be_anything(offline, engines):
    engines.at_run = {2: -math.inf}
    assert offline("--min-context", "20") == 0


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_a_report_names_the_record_with_a_number_that_is_none(experiment, constant, capsys):
    record = experiment / H2O
    text = record.read_text()
    value = str(read_json(record)["perplexity"])
    record.write_text(text.replace(value, constant, 1))
    assert main(["report", str(experiment)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(record) in error
    assert f"holds {constant}" in error


@pytest.mark.parametrize(
    "name", [H2O, "h2o_s0.5_ctx256_load1.json", "experiment.json", "failed/dense.json"]
)
def test_a_report_names_a_file_that_is_cut_short(experiment, name, capsys):
    damaged = experiment / name
    damaged.parent.mkdir(exist_ok=True)
    damaged.write_text(damaged.read_text() if damaged.exists() else '{"key": "dense_s0.0"}')
    truncate(damaged)
    assert main(["report", str(experiment)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"kv-eviction: {damaged} is damaged")
    assert "delete it" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"key": "h2o_s0.5"}'])
@pytest.mark.parametrize("name", [H2O, "experiment.json"])
def test_a_report_names_a_file_that_holds_something_else(experiment, name, content, capsys):
    (experiment / name).write_text(content)
    assert main(["report", str(experiment)]) == 2
    assert f"kv-eviction: {experiment / name} is no" in capsys.readouterr().err


def test_a_record_that_is_cut_short_is_measured_again(offline, experiment, capsys):
    before = read_json(experiment / H2O)
    for name in (H2O, "dense_s0.0_ctx256_load0.json"):
        truncate(experiment / name)
    assert offline() == 0
    told = capsys.readouterr().err
    assert f"{offline.folder / H2O} cannot be read; its run is measured again" in told
    assert f"{NUM_RUNS - 2} run(s) are there already" in told
    assert read_json(offline.folder / H2O)["windows"] == before["windows"]


def test_a_damaged_record_that_no_run_replaces_is_refused_before_anything_runs(
    offline, engines, experiment, capsys
):
    (experiment / "streaming_s0.5_ctx256_seed0.json").write_text("{")
    assert offline("--sparsity", "0.6") == 2
    assert "streaming_s0.5_ctx256_seed0.json is damaged" in capsys.readouterr().err
    assert engines.started == 0


def test_a_damaged_experiment_costs_no_run(offline, engines, experiment, capsys):
    truncate(experiment / "experiment.json")
    assert offline() == 0
    assert "experiment.json is damaged" in capsys.readouterr().err
    assert engines.started == 0
    assert len(read_json(experiment / "experiment.json")["sessions"]) == 1


def test_a_full_disk_ends_a_sweep_with_a_sentence_and_keeps_what_is_done(offline, capsys):
    full_disk(offline.folder / H2O)
    assert offline() == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"cannot write to {offline.folder / H2O}: No space left on device" in error
    assert "the record is in" in error
    assert "finished runs are kept, --experiment-name e goes on" in error
    assert [path.name for path in offline.folder.glob("*_ctx256_*")] == [
        "dense_s0.0_ctx256_seed0.json"
    ]
    assert leftovers(offline.folder) == []
    assert offline() == 0
    assert "1 run(s) are there already" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["aggregated_results.json", "perplexity.png", "report.html"])
def test_a_full_disk_leaves_a_report_as_it_was(experiment, name, capsys):
    before = (experiment / name).read_bytes()
    full_disk(experiment / name)
    assert main(["report", str(experiment)]) == 2
    assert f"cannot write to {experiment / name}: No space" in capsys.readouterr().err
    assert (experiment / name).read_bytes() == before
    assert leftovers(experiment) == []


def test_settings_without_effect_say_so(offline, capsys):
    assert offline("--score-half-life", "9", "--text-column", "body", "--no-throughput") == 0
    told = capsys.readouterr().err
    assert "--score-half-life has no effect without --score decay" in told
    assert "--text-column has no effect" in told
    assert "--load-requests has no effect without --throughput" in told
    assert "--load-runs" not in told


def test_tables_tell_the_sparsity_that_was_in_effect(offline, capsys):
    # 16 blocks, of which 4 always stay.
    assert offline("--sparsity", "0.5", "0.9", "--context-length", "512") == 0
    shown = capsys.readouterr().out
    for table in shown.strip().split("\n\n")[:2]:
        header, _, *rows = (line.split() for line in table.splitlines())
        assert header[:3] == ["method", "sparsity", "effective"]
        cells = {(row[0], row[1]): row[2] for row in rows}
        assert cells == {("dense", "-"): "-", ("h2o", "0.5"): "0.5", ("h2o", "0.9"): "0.75"}
    for kind in ("seed0", "load0"):
        record = read_json(offline.folder / f"h2o_s0.9_ctx512_{kind}.json")
        assert record["effective_sparsity"] == 0.75
    results = read_json(offline.folder / "aggregated_results.json")
    assert results["h2o_s0.9"]["effective_sparsity"] == 0.75
    assert results["dense_s0.0"]["effective_sparsity"] == 0
    page = (offline.folder / "report.md").read_text()
    assert page.count("| method | sparsity | effective |") == 3
    assert "*Effective*: the sparsity that is left" in page
    assert "0.9 (effective 0.75): left out, nothing was expected at this sparsity" in page
    assert "; 0.9: perplexity" not in page


def test_a_study_tells_the_effective_sparsity_of_each_point(engines, study, tmp_path):
    varied = tmp_path / "varied.yaml"
    settings = {**json.loads(study.read_text()), "sparsity": [0.9], "context_length": 640}
    settings.update(throughput=False, load_requests=None, vary={"min_blocks": [2, 6]})
    varied.write_text(json.dumps(settings))
    assert main(arguments(varied, tmp_path)) == 0
    row = next(
        line
        for line in (tmp_path / "varied" / "report.md").read_text().splitlines()
        if line.startswith("| h2o")
    )
    first, second = row.split(" | ")[2:]
    assert " at " not in first, "2 of 20 blocks: what was asked"
    assert " at 0.7" in second
