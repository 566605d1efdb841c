"""A sweep on a made-up engine: resuming, refusing to mix, failed runs, interruption, reports."""

import json
from contextlib import contextmanager

import pytest

import harness.sweep.offline as sweep_module
from harness.analysis.estimate import Estimate
from harness.cli import main
from harness.errors import UsageError
from harness.records.files import read_json
from harness.report.experiment import report_experiment
from harness.resources.scored import UnfaithfulRun
from harness.study.settings import Study
from harness.sweep.offline import Sweep

from .made_up_engine import NUM_RUNS, SETTINGS, made_up_text, run


@pytest.fixture
def settings(tmp_path):
    return {**SETTINGS, "dataset": made_up_text(tmp_path)}


def test_everything_runs_on_one_engine_and_is_skipped_the_second_time(engines, settings, tmp_path):
    first = run(settings, tmp_path / "e")
    assert (engines.started, first.session.runs_done) == (1, NUM_RUNS)
    second = run(settings, tmp_path / "e")
    assert engines.started == 1
    assert (second.session.runs_done, second.session.runs_skipped) == (0, NUM_RUNS)
    sessions = read_json(tmp_path / "e" / "experiment.json")["sessions"]
    assert [session["runs_done"] for session in sessions] == [NUM_RUNS, 0]


def test_a_sweep_killed_twice_ends_in_the_same_report(engines, settings, tmp_path):
    run(settings, tmp_path / "undisturbed" / "e")
    report_experiment(tmp_path / "undisturbed" / "e")
    for at in (3, 5):
        engines.at_run = {engines.runs + at - 1: KeyboardInterrupt()}
        with pytest.raises(KeyboardInterrupt):
            run(settings, tmp_path / "killed" / "e")
    engines.at_run = {}
    last = run(settings, tmp_path / "killed" / "e")
    assert 0 < last.session.runs_done < NUM_RUNS
    report_experiment(tmp_path / "killed" / "e")
    assert untimed(tmp_path / "killed" / "e") == untimed(tmp_path / "undisturbed" / "e")


def untimed(folder):
    """What a report says, but for the part that is about time; and its figures."""
    said = (folder / "report.md").read_text().split("## Speed and time")[0]
    figures = {p.name: p.read_bytes() for p in folder.glob("*.svg") if p.stem != "throughput"}
    return said, (folder / "significance_tests.json").read_text(), figures


@pytest.mark.usefixtures("blank_figures")
def test_a_failed_run_is_recorded_and_the_sweep_goes_on(engines, settings, tmp_path):
    engines.at_run = {2: RuntimeError("out of memory"), 4: UnfaithfulRun("took 9 steps")}
    sweep = run(settings, tmp_path / "e")
    assert sweep.session.runs_failed == 2
    assert sweep.session.runs_done == NUM_RUNS - 2
    assert engines.started == 2, "an engine that raised is not trusted any more"
    failed = sorted((tmp_path / "e" / "failed").glob("*.json"))
    reasons = {read_json(path)["reason"] for path in failed}
    assert reasons == {"RuntimeError: out of memory", "took 9 steps"}
    report_experiment(tmp_path / "e")
    assert "out of memory" in (tmp_path / "e" / "report.md").read_text()
    assert "out of memory" in (tmp_path / "e" / "report.html").read_text()
    again = run(settings, tmp_path / "e")
    assert again.session.runs_done == 2
    assert not list((tmp_path / "e" / "failed").glob("*.json")), "mended by the second attempt"


@pytest.mark.usefixtures("blank_figures")
def test_an_engine_that_does_not_start_fails_its_runs_only(engines, settings, tmp_path):
    starts = engines.running

    @contextmanager
    def running(specification):
        if specification.prefill_chunk == 32:
            raise RuntimeError("no memory left")
        with starts(specification) as engine:
            yield engine

    sweep_module.running = running
    sweep = run({**settings, "vary": {"prefill_chunk": [32, 64]}}, tmp_path / "e")
    assert (sweep.session.runs_done, sweep.session.runs_failed) == (NUM_RUNS, NUM_RUNS)
    report_experiment(tmp_path / "e")
    report = (tmp_path / "e" / "report.md").read_text()
    assert "no memory left" in report
    assert "prefill_chunk 64" in report


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_samples": 5}, "holds another specification (num_samples 6 there, 5 here)"),
        ({"prefill_chunk": 32}, "engine.prefill_chunk 64 there, 32 here"),
        (
            {"methods": ["streaming"], "prefill_chunk": 32},
            "belongs to another comparison (engine.prefill_chunk 64 there, 32 here)",
        ),
        (
            {"methods": ["dense", {"policy": "cab", "name": "cab", "args": {"local": 0.3}}]},
            "method.args.local None there, 0.3 here",
        ),
    ],
)
def test_another_specification_is_never_mixed_in(engines, settings, tmp_path, change, sentence):
    run(settings, tmp_path / "e")
    with pytest.raises(UsageError, match="give another --experiment-name") as refusal:
        Sweep(Study.parse({**settings, **change}), tmp_path / "e")
    assert sentence in str(refusal.value)


def test_other_code_is_never_mixed_in_unless_measured_again(
    engines, settings, tmp_path, monkeypatch
):
    run(settings, tmp_path / "e")
    monkeypatch.setattr("harness.records.provenance.code_fingerprint", lambda modules: "0" * 16)
    with pytest.raises(UsageError, match=r"was made by another code .* --redo"):
        Sweep(Study.parse(settings), tmp_path / "e")
    assert run(settings, tmp_path / "e", redo=True).session.runs_done == NUM_RUNS
    assert run(settings, tmp_path / "e").session.runs_skipped == NUM_RUNS


def test_more_methods_and_seeds_may_be_added(engines, settings, tmp_path):
    run({**settings, "methods": ["dense", "h2o"], "num_runs": 1}, tmp_path / "e")
    sweep = run(settings, tmp_path / "e")
    assert (sweep.session.runs_skipped, sweep.session.runs_done) == (4, NUM_RUNS - 4)


@pytest.mark.usefixtures("blank_figures")
def test_the_command_reports_and_returns_what_happened(engines, settings, tmp_path, capsys):
    study = tmp_path / "study.yaml"
    varied = {**settings, "num_runs": 1, "vary": {"sink_blocks": [0, 1]}}
    study.write_text(json.dumps(varied))
    arguments = ["offline", "--study", str(study), "--output-dir", str(tmp_path / "runs")]
    engines.at_run = {5: UnfaithfulRun("took 9 steps")}
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert "took 9 steps" in shown.err
    assert "sink_blocks 1" in shown.out
    assert main(arguments) == 0
    folder = tmp_path / "runs" / "study"
    page = (folder / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 1
    assert "<table>" in page
    assert 'src="http' not in page
    names = {path.name for path in (folder / "sink-blocks=0").iterdir()}
    for figure in ("perplexity", "throughput", "memory", "position", "cache", "differences"):
        assert {f"{figure}.png", f"{figure}.svg"} <= names
    before = (folder / "sink-blocks=1" / "significance_tests.json").read_text()
    (folder / "sink-blocks=1" / "significance_tests.json").unlink()
    assert main(["report", str(folder / "sink-blocks=1")]) == 0
    assert (folder / "sink-blocks=1" / "significance_tests.json").read_text() == before


@pytest.mark.usefixtures("blank_figures")
def test_results_have_the_documented_metrics(engines, settings, tmp_path):
    run(settings, tmp_path / "e")
    report_experiment(tmp_path / "e")
    entry = read_json(tmp_path / "e" / "aggregated_results.json")["h2o_s0.5"]
    for metric in (
        "perplexity",
        "word_perplexity",
        "byte_perplexity",
        "bits_per_byte",
        "avg_cache_size",
        "peak_memory_mib",
        "process_peak_memory_mib",
        "blocks_evicted",
        "decision_seconds",
    ):
        assert set(entry[metric]) == Estimate.__required_keys__, metric
    for metric in (
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "output_tokens_per_second",
        "preemptions",
    ):
        assert set(entry["throughput"][metric]) == Estimate.__required_keys__, metric
    # 4 requests of 224 + 32 tokens; the made-up engine takes a second an output token.
    assert entry["throughput"]["prefill_tokens_per_second"]["mean"] == 4 * 224
    assert entry["throughput"]["decode_tokens_per_second"]["mean"] == 4
    tests = read_json(tmp_path / "e" / "significance_tests.json")
    assert set(tests) == {"h2o_vs_cab_s0.5", "dense_vs_h2o_s0.5", "dense_vs_cab_s0.5"}
    result = tests["dense_vs_h2o_s0.5"]["all_tokens"]
    assert result["paired_t_p_holm"] > result["paired_t_p"]
    assert result["family_size"] == 3
    assert "Holm" in tests["dense_vs_h2o_s0.5"]["test"]


def test_min_context_leaves_the_first_tokens_unscored(engines, settings, tmp_path):
    run({**settings, "min_context": 65}, tmp_path / "e")
    made = read_json(tmp_path / "e" / "h2o_s0.5_ctx256_seed0.json")
    assert made["total_tokens"] == 6 * (255 - 64)
    assert made["windows"][0]["log_likelihoods"][0] == 0.0
    assert made["perplexity"] == pytest.approx(made["perplexity_after_eviction"])


def test_records_tell_nothing_of_where_files_lie(engines, settings, tmp_path):
    run(settings, tmp_path / "e")
    for path in (tmp_path / "e").glob("*.json"):
        assert str(tmp_path) not in path.read_text()
