"""Records that cannot be written or read: nothing is lost, and what is missing is named."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest

from harness.cli import main
from harness.records import output
from harness.records.output import RecordElsewhere, save_record

from .serving_stub import load, running

RESULTS = Path(__file__).parents[2] / "results"


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_record_that_cannot_be_written_is_kept_elsewhere(tmp_path, temporary, capsys):
    folder = tmp_path / "out"

    def spoil():
        """The folder goes away during the run, and something takes its place."""
        if folder.is_dir():
            shutil.rmtree(folder)
            folder.write_text("")

    with running() as (address, stub):
        stub.on_request = spoil
        status = main(
            [
                "load",
                "--base-url",
                address,
                "--output",
                str(folder / "r.json"),
                "--num-requests",
                "3",
                "--vocab-size",
                "9",
                "--input-length",
                "4",
                "--output-length",
                "5",
            ]
        )
    assert status == 1
    printed = capsys.readouterr()
    assert "3 of 3 requests succeeded" in printed.out
    (kept,) = temporary.iterdir()
    assert f"cannot write to {folder / 'r.json'}" in printed.err
    assert f"the record is in {kept}: move it there" in printed.err
    assert json.loads(kept.read_text())["counts"]["succeeded"] == 3


def test_a_number_that_no_record_may_hold_loses_no_record(tmp_path, temporary):
    with pytest.raises(RecordElsewhere, match="cannot write to"):
        save_record(tmp_path / "r.json", {"a": float("nan"), "b": 1})
    (kept,) = temporary.iterdir()
    assert '"b": 1' in kept.read_text()


def test_without_room_for_a_temporary_file_the_figures_are_shown(
    tmp_path, temporary, monkeypatch, capsys
):
    def fails(path, record):
        raise output.UnwritableFile(f"cannot write to {path}: No space left on device")

    monkeypatch.setattr(output, "write_json", fails)
    temporary.rmdir()
    with running() as (address, _):
        status, record = load(address, tmp_path)
    assert (status, record) == (1, None)
    printed = capsys.readouterr()
    assert "request_throughput" in printed.out
    assert "nor to a temporary file" in printed.err


def test_an_output_that_is_a_folder_shows_before_the_run(tmp_path, capsys):
    with running() as (address, stub):
        assert (
            main(["load", "--base-url", address, "--num-requests", "1", "--output", str(tmp_path)])
            == 2
        )
    assert "it is a folder; name a file in it" in capsys.readouterr().err
    assert stub.count == 0


@pytest.fixture
def copy(tmp_path):
    """A copy of a committed study, under a name of its own."""
    folder = tmp_path / "copy"
    made = shutil.ignore_patterns("aggregated_results.json", "*.html", "*.svg")
    shutil.copytree(RESULTS / "serving-cpu", folder, ignore=made)
    return folder


def test_a_copy_of_a_study_gives_the_same_report(copy):
    (copy / "methods.png").unlink()
    assert main(["report", str(copy)]) == 0
    for name in ("report.md", "methods.png"):
        assert (copy / name).read_bytes() == (RESULTS / "serving-cpu" / name).read_bytes(), name
    assert {"report.html", "aggregated_results.json"} <= {path.name for path in copy.iterdir()}


@pytest.mark.usefixtures("blank_figures")
def test_the_first_report_takes_the_name_of_its_folder(copy):
    (copy / "report.md").unlink()
    assert main(["report", str(copy)]) == 0
    assert (copy / "report.md").read_text().startswith("# Serving: copy\n")


@pytest.mark.parametrize("content", ["", '{"run": {"method": "cab", "spar', "[1, 2]", "{}", "\0"])
@pytest.mark.usefixtures("blank_figures")
def test_a_record_that_cannot_be_read_is_left_out_and_named(content, copy, capsys):
    # The first by name, which used to decide what the folder holds.
    (copy / "cab_s0.9_rate1_seed0.json").write_text(content)
    assert main(["report", str(copy)]) == 0
    error = capsys.readouterr().err
    assert str(copy / "cab_s0.9_rate1_seed0.json") in error
    assert "the report leaves it out" in error
    page = (copy / "report.md").read_text()
    assert "- `cab_s0.9_rate1_seed0.json` cannot be read and is left out" in page
    results = json.loads((copy / "aggregated_results.json").read_text())
    assert results["cab_s0.9_rate1"]["num_runs"] == 2


@pytest.mark.parametrize("name", ["study.json", "aggregated_results.json", "report.md"])
@pytest.mark.usefixtures("blank_figures")
def test_files_that_follow_from_others_may_be_broken(name, copy):
    (copy / name).write_bytes(b"\xff{")
    assert main(["report", str(copy)]) == 0


def test_a_folder_without_a_readable_record(copy, capsys):
    for path in copy.glob("*_seed*.json"):
        path.write_text("{")
    assert main(["report", str(copy)]) == 2
    assert f"{copy} holds no complete serving record" in capsys.readouterr().err


@pytest.mark.usefixtures("blank_figures")
def test_a_report_on_a_server_without_metrics(copy):
    for path in copy.glob("*_seed*.json"):
        record = json.loads(path.read_text())
        record["samples"], record["memory"] = {"time_s": []}, {}
        record["summary"]["steady"]["output_throughput"] = None
        path.write_text(json.dumps(record))
    assert main(["report", str(copy)]) == 0
    assert "KV MiB/request" not in (copy / "report.md").read_text()
