"""Sweeps over stub servers: start, run, resume, die, clean up, report."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from harness.cli import main
from harness.errors import UsageError
from harness.measure.load import Outcome
from harness.measure.load_record import MEASURING
from harness.records.code import import_closure
from harness.resources.processes import last_error
from harness.resources.serve_flags import serve_flags
from harness.resources.server import ServerError, free_port, serving
from harness.study.serving_specification import server_settings
from harness.study.serving_study import ServingStudy
from harness.sweep import serving as sweep

from ..child import children

STUB = [sys.executable, "-m", "tests.unit.serving_stub"]
STUDY = {
    "methods": ["dense", "h2o"],
    "sparsity": [0.9],
    "rates": [20, 40],
    "seeds": [0, 1],
    "vocabulary_size": 100,
    "warm_up_requests": 2,
    "load": {"num_requests": 6, "input_length": 4, "output_length": 5},
    "slo": {"time_to_first_token_ms": {"p99": 5000}},
}


@pytest.fixture
def rendering_stub_servers(monkeypatch, tmp_path):
    """Let sweeps start stubs: ``modes`` by method."""
    modes = {}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")

    def command(run):
        return [*STUB, *modes.get(run.method.name, ["good"])]

    monkeypatch.setattr(sweep, "server_command", command)
    return modes


@pytest.fixture
def stub_servers(rendering_stub_servers, blank_figures):
    return rendering_stub_servers


def study(tmp_path, **changes):
    path = tmp_path / "demo.yaml"
    path.write_text(json.dumps({**STUDY, "model": str(tmp_path / "model"), **changes}))
    return ["serve-sweep", str(path), "--output-dir", str(tmp_path / "out")]


def records(tmp_path):
    paths = sorted((tmp_path / "out" / "demo").glob("*_seed*.json"))
    return {path.stem: json.loads(path.read_text()) for path in paths}


def failures(tmp_path):
    paths = sorted((tmp_path / "out" / "demo" / "failed").glob("*_seed*.json"))
    return {path.stem: json.loads(path.read_text()) for path in paths}


def test_a_sweep_reports_and_resumes(rendering_stub_servers, tmp_path, capsys):
    assert main(study(tmp_path)) == 0
    found = records(tmp_path)
    assert set(found) == {
        f"{key}_rate{rate}_seed{seed}"
        for key in ("dense_s0.0", "h2o_s0.9")
        for rate in (20, 40)
        for seed in (0, 1)
    }
    one = found["h2o_s0.9_rate40_seed1"]
    assert one["complete"]
    assert one["kind"] == "serving"
    assert one["run"]["slo"] == STUDY["slo"]
    other = found["dense_s0.0_rate40_seed1"]
    assert one["requests"]["intended_s"] == other["requests"]["intended_s"], "same arrivals"
    folder = tmp_path / "out" / "demo"
    report = (folder / "report.md").read_text()
    assert "| h2o 0.9 | 40 |" in report
    assert "| h2o 0.9 | 40 | - |" in report, "the highest rate tested was kept"
    for stem in ("latency", "goodput", "throughput", "kv_memory"):
        assert (folder / f"{stem}.png").stat().st_size > 10_000
    assert not children()
    # A second call runs what is missing, and nothing else.
    (folder / "dense_s0.0_rate20_seed0.json").unlink()
    before = {key: value["timestamp"] for key, value in found.items()}
    capsys.readouterr()
    assert main(study(tmp_path)) == 0
    assert "7 runs were there already" in capsys.readouterr().out
    after = {key: value["timestamp"] for key, value in records(tmp_path).items()}
    del before["dense_s0.0_rate20_seed0"]
    assert before.items() < after.items()


def test_records_of_another_study_are_not_mixed_in(stub_servers, tmp_path, capsys):
    assert main(study(tmp_path, rates=[50], seeds=[0], methods=["dense"])) == 0
    changed = {**STUDY["load"], "num_requests": 5}
    assert main(study(tmp_path, rates=[50], seeds=[0], methods=["dense"], load=changed)) == 2
    error = capsys.readouterr().err
    assert "holds another specification (load.num_requests 6 there, 5 here)" in error
    assert "give another --output-dir, or --redo to measure it again" in error
    (tmp_path / "model" / "config.json").write_text('{"hidden_size": 1}')
    assert main(study(tmp_path, rates=[50], seeds=[0], methods=["dense"])) == 2
    assert "model_fingerprint" in capsys.readouterr().err, "another model of the same name"
    arguments = study(tmp_path, rates=[50], seeds=[0], methods=["dense"], load=changed)
    assert main([*arguments, "--redo"]) == 0
    assert records(tmp_path)["dense_s0.0_rate50_seed0"]["counts"]["planned"] == 5
    pictures = {path.stem for path in (tmp_path / "out" / "demo").glob("*.png")}
    assert pictures == {"kv_memory"}, "one method at one rate has nothing beside it"


def test_a_record_that_cannot_be_read_is_measured_again(stub_servers, tmp_path, capsys):
    arguments = study(tmp_path, rates=[50], seeds=[0, 1], methods=["dense"])
    content = '{"complete": true, "run": {"ha'
    assert main(arguments) == 0
    folder = tmp_path / "out" / "demo"
    broken = folder / "dense_s0.0_rate50_seed0.json"
    broken.write_text(content)
    (folder / "experiment.json").write_text('{"slo"')
    stub_servers["dense"] = ["no_start"]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert f"{broken} cannot be read; its run is measured again" in error
    assert f"{folder / 'experiment.json'} is damaged: times of earlier sessions are lost" in error
    assert broken.read_text() == content, "kept until there is a new one"
    stub_servers["dense"] = ["good"]
    assert main(arguments) == 0
    assert "1 runs were there already" in capsys.readouterr().out
    assert records(tmp_path)["dense_s0.0_rate50_seed0"]["complete"]
    sessions = json.loads((folder / "experiment.json").read_text())["sessions"]
    assert [s["runs_done"] for s in sessions] == [0, 1]
    assert not failures(tmp_path)
    assert "cannot be read" not in (folder / "report.md").read_text()


def test_a_record_that_cannot_be_written_ends_the_sweep_and_is_kept(
    stub_servers, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "out" / "demo"
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    def run_load(*arguments, original=sweep.run_load, **options):
        outcome = original(*arguments, **options)
        folder.rename(tmp_path / "gone")
        folder.write_text("")
        return outcome

    monkeypatch.setattr(sweep, "run_load", run_load)
    assert main(study(tmp_path, rates=[50], warm_up_requests=0)) == 1
    (kept,) = (tmp_path / "temporary").glob("*_seed*.json")
    error = capsys.readouterr().err
    assert f"cannot write to {folder / 'dense_s0.0_rate50_seed0.json'}" in error
    assert f"the record is in {kept}" in error
    assert "Traceback" not in error
    assert json.loads(kept.read_text())["run"]["method"] == "dense"
    assert not children()


def test_what_is_wrong_with_the_last_load_shows_before_the_first_server(
    stub_servers, tmp_path, capsys
):
    load = {**STUDY["load"], "warm_up_s": 1.0, "arrivals": "constant", "num_requests": 30}
    assert main(study(tmp_path, rates=[5, 500], load=load)) == 2
    assert "leave no request for the steady figures" in capsys.readouterr().err
    assert main(study(tmp_path, server={"max_model_len": 8})) == 2
    assert "more than the server's max_model_len 8" in capsys.readouterr().err
    assert not records(tmp_path)
    assert not (tmp_path / "out" / "demo" / "logs").exists()


def test_a_study_reaches_servers_that_inherit_a_key(stub_servers, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    stub_servers["dense"] = ["good", "--api-key", "secret"]
    assert main(study(tmp_path, rates=[50], seeds=[0], methods=["dense"])) == 0
    assert "secret" not in json.dumps(records(tmp_path))


def edit(monkeypatch, module):
    """As if a module of the harness had been edited."""
    original = Path.read_bytes

    def read_bytes(path):
        edited = path.as_posix().endswith(f"harness/{module}")
        return original(path) + b"# edited" * edited

    monkeypatch.setattr(Path, "read_bytes", read_bytes)


def test_records_of_other_measuring_code_are_not_mixed_in(
    stub_servers, tmp_path, monkeypatch, capsys
):
    arguments = study(tmp_path, rates=[50], seeds=[0], methods=["dense"])
    assert main(arguments) == 0
    with monkeypatch.context() as patch:
        edit(patch, "report/serving_figures.py")
        assert main(arguments) == 0
    assert "1 runs were there already" in capsys.readouterr().out
    edit(monkeypatch, "client/client.py")
    assert main(arguments) == 2
    assert "was made by another code" in capsys.readouterr().err


def test_every_module_that_measures_is_in_the_fingerprint_of_a_record():
    """The closure of imports, read from the sources, against what Python really loads."""
    code = (
        f"import sys, importlib; [importlib.import_module(m) for m in {MEASURING}];"
        "print(*[m.__file__ for n, m in sys.modules.items() if n[:8] == 'harness.'], sep='\\n')"
    )
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    counted = {str(path) for path in import_closure(MEASURING)}
    assert {path for path in loaded if not path.endswith("__init__.py")} <= counted
    harness = Path(sweep.__file__).parents[1]
    for name in (
        "client/client.py",
        "client/traces.py",
        "inputs/corpora.py",
        "resources/server.py",
    ):
        assert str(harness / name) in counted
    assert not any("/report/" in path or "/commands/" in path for path in counted)


def test_a_server_that_does_not_start_fails_its_runs_only(stub_servers, tmp_path, capsys):
    stub_servers["dense"] = ["no_start"]
    assert main(study(tmp_path, rates=[50], seeds=[0])) == 1
    assert set(records(tmp_path)) == {"h2o_s0.9_rate50_seed0"}
    error = capsys.readouterr().err
    assert "the server ended with status 3: ValueError: this model cannot be" in error
    (failed,) = failures(tmp_path).values()
    assert failed["key"] == "dense_s0.0_rate50"
    assert "this model cannot be" in failed["reason"]
    assert "this model cannot be" in (tmp_path / "out" / "demo" / "report.md").read_text()


def test_a_server_that_does_not_say_what_it_serves_fails_its_runs_only(
    stub_servers, tmp_path, capsys
):
    stub_servers["dense"] = ["no_models"]
    assert main(study(tmp_path, rates=[50], seeds=[0])) == 1
    assert set(records(tmp_path)) == {"h2o_s0.9_rate50_seed0"}
    assert "no OpenAI server answers at" in capsys.readouterr().err
    assert set(failures(tmp_path)) == {"dense_s0.0_rate50_seed0"}
    assert not children()


def test_preemptions_of_stock_vllm_are_counted_by_its_own_metric(stub_servers, tmp_path):
    assert main(study(tmp_path, rates=[50], seeds=[0], methods=["stock"])) == 0
    (record,) = records(tmp_path).values()
    counted = record["samples"]["num_preemptions"]
    assert counted[-1] == 2 + 6  # warm-up and load
    assert record["memory"]["preemptions"] == counted[-1] - counted[0] > 0
    assert not [name for name in record["memory"] if name.startswith("kv_eviction")]


def test_interrupting_the_warm_up_ends_a_sweep(stub_servers, tmp_path, monkeypatch, capsys):
    loads = []

    def run_load(load, plan, target, **options):
        loads.append(load)
        return Outcome({}, "interrupted", interrupted=True)

    monkeypatch.setattr(sweep, "run_load", run_load)
    assert main(study(tmp_path)) == 130
    assert [load.num_requests for load in loads] == [STUDY["warm_up_requests"]]
    assert "finished runs are kept, the same command resumes" in capsys.readouterr().err
    assert not records(tmp_path)
    assert not children()


def test_a_folder_that_cannot_be_written_shows_before_a_server_starts(
    stub_servers, tmp_path, capsys
):
    assert main([*study(tmp_path)[:2], "--output-dir", "/proc/none"]) == 2
    assert "cannot write to /proc/none/demo" in capsys.readouterr().err


def test_a_server_that_dies_is_replaced(stub_servers, tmp_path, capsys):
    # Warm-up 2, first run 6: it dies in the second run; the next server takes the rest.
    stub_servers["dense"] = ["die", "--after", "10"]
    assert main(study(tmp_path, rates=[20], seeds=[0, 1, 2], methods=["dense"])) == 1
    assert set(records(tmp_path)) == {f"dense_s0.0_rate20_seed{seed}" for seed in (0, 2)}
    (failed,) = failures(tmp_path).values()
    assert (failed["seed"], failed["complete"]) == (1, False)
    assert "the server" in failed["reason"]
    assert failed["counts"]["planned"] == 6, "what there is of the record is kept"
    folder = tmp_path / "out" / "demo"
    assert {p.name for p in (folder / "logs").iterdir()} == {"dense_s0.0.log", "dense_s0.0.2.log"}
    assert "What did not go as planned" in (folder / "report.md").read_text()
    assert not children()
    stub_servers["dense"] = ["good"]
    assert main(study(tmp_path, rates=[20], seeds=[0, 1, 2], methods=["dense"])) == 0
    assert len(records(tmp_path)) == 3
    assert not failures(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_a_sweep_leaves_no_process(number, tmp_path):
    code = (
        "import sys; from harness.sweep import serving as sweep; from harness.cli import main; "
        f"sweep.server_command = lambda *a: {[*STUB, 'slow']!r}; sys.exit(main(sys.argv[1:]))"
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    arguments = study(tmp_path, rates=[1], load={**STUDY["load"], "num_requests": 60})
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    for line in process.stderr:
        if line.startswith("dense_s0.0_rate1, seed 0"):
            break
    time.sleep(2)
    servers = psutil.Process(process.pid).children(recursive=True)
    assert servers
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "finished runs are kept" in error
    assert "Traceback" not in error
    assert not any(server.is_running() for server in servers)
    assert not records(tmp_path)
    (failed,) = failures(tmp_path).values()
    assert failed["reason"] == "interrupted"


def test_a_server_with_children_is_ended_whole(tmp_path):
    code = (
        "import subprocess, sys, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        "subprocess.run([*sys.argv[1].split(), *sys.argv[2:]])"
    )
    command = [sys.executable, "-c", code, " ".join([*STUB, "good"])]
    with serving(command, free_port(), tmp_path / "log", patience_s=1) as server:
        members = [psutil.Process(server.pid), *children()]
        assert len(members) >= 3
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in members)


def test_a_server_that_is_never_ready(tmp_path):
    started = time.monotonic()
    with (
        pytest.raises(ServerError, match="did not answer within 2 s"),
        serving([*STUB, "never_ready"], free_port(), tmp_path / "log", startup_timeout_s=2),
    ):
        pass
    assert time.monotonic() - started < 10
    assert not children()


def test_the_telling_line_of_a_log(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "INFO fine\n(EngineCore pid=3) ValueError: the pool is too small\nmore\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert last_error(log) == "ValueError: the pool is too small"


def test_flags():
    flags = serve_flags(
        {
            "block_size": 32,
            "enable_prefix_caching": False,
            "enforce_eager": True,
            "x": None,
            "logits_processors": ["a:b"],
            "kv_transfer_config": {"kv_role": "kv_both"},
        }
    )
    assert flags == [
        "--block-size",
        "32",
        "--no-enable-prefix-caching",
        "--enforce-eager",
        "--logits-processors",
        "a:b",
        "--kv-transfer-config",
        '{"kv_role":"kv_both"}',
    ]


def test_serve_prints_the_plain_command(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    arguments = [
        "serve",
        str(tmp_path),
        "--policy",
        "cab",
        "--sparsity",
        "0.9",
        "--score-query-stride",
        "4",
        "--max-model-len",
        "1024",
        "--print-command",
        "--enable-lora",
    ]
    assert main(arguments) == 0
    line = capsys.readouterr().out.strip()
    assert line.startswith(f"vllm serve {tmp_path} --kv-transfer-config '{{")
    assert '"policy":"cab","sparsity":0.9' in line
    assert '"score_query_stride":4' in line
    # What was given comes as it was given; a CPU's pool may be set behind it.
    assert " --max-model-len 1024 --enable-lora" in line


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"methdos": ["h2o"]}, "did you mean 'methods'"),
        ({"methods": ["h20"]}, "unknown policy 'h20'"),
        ({"sparsity": [1.5]}, "sparsity is 1.5"),
        ({"seeds": []}, "at least one"),
        ({"eviction": {"policy": "cab"}}, "is set by methods"),
        ({"eviction": {"score_every": 8}}, "score_every is now called score_query_stride"),
        ({"slo": {"speed": {"p99": 1}}}, "slo names 'speed'"),
        ({"load": {"num_requests": 3, "x": 1}}, "unknown or missing load setting"),
        ({"load": {}}, "num_requests"),
        ({"load": ["x"]}, "load of a serving study must be a mapping"),
        ({"load": {"num_requests": 3, "quality": 5}}, "quality of a load is 5"),
        ({"load": {"num_requests": 3, "slo": "fast"}}, "slo of a load is 'fast'"),
        ({"rates": 4}, "rates of a serving study must be a list"),
        ({"methods": [{"sparsity": [0.5]}]}, "give a policy's name or {policy, name, args}"),
        (
            {"methods": [{"policy": "h2o", "color": 1}]},
            "it takes policy, name, args and granularity",
        ),
        ({"methods": [{"policy": "cab", "args": {"local": 0.9}}]}, "sum to 1"),
        ({"budget_tokens": [40]}, "give at least 64"),
        ({"vary": {"colour": [1]}}, "no setting that can vary"),
        ({"vary": {"block_size": 32}}, "must be a list of values"),
        ({"vary": {"block_size": [32, 32]}}, "the same value twice"),
        ({"methods": [{"policy": "h2o", "rates": 4}]}, "rates of method"),
        ({"methods": ["h2o", {"policy": "h2o", "seeds": [1]}]}, "h2o_s0.9_rate20_seed1 twice"),
    ],
)
def test_bad_studies(changes, sentence, stub_servers, tmp_path, capsys):
    assert main(study(tmp_path, **changes)) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_is_known_by_the_content_of_the_files_it_reads(stub_servers, tmp_path):
    text = tmp_path / "a.txt"
    load = {"num_requests": 3, "prompts": "text", "dataset": f"text:{text}"}
    hashes = set()
    for content in ("words", "other words", "words"):
        text.write_text(content)
        made = ServingStudy.parse({**STUDY, "model": str(tmp_path / "model"), "load": load}).runs()
        hashes.add(made[0].hash)
    assert len(hashes) == 2


def test_methods_with_rates_and_seeds_of_their_own():
    methods = ["dense", {"policy": "h2o", "sparsity": [0.5], "rates": [80], "seeds": [2]}]
    made = ServingStudy.parse({**STUDY, "methods": methods}).runs()
    assert [run.file_name for run in made] == [
        "dense_s0.0_rate20_seed0.json",
        "dense_s0.0_rate20_seed1.json",
        "dense_s0.0_rate40_seed0.json",
        "dense_s0.0_rate40_seed1.json",
        "h2o_s0.5_rate80_seed2.json",
    ]


def test_methods_may_have_parameters_names_and_budgets():
    methods = [
        {"policy": "cab", "name": "cab-forman", "args": {"bridge_definition": "forman"}},
        {"policy": "h2o", "budget_tokens": [1024]},
    ]
    made = ServingStudy.parse({**STUDY, "methods": methods, "rates": [20], "seeds": [0]})
    forman, budget = made.runs()
    assert [r.key for r in (forman, budget)] == ["cab-forman_s0.9_rate20", "h2o_b1024_rate20"]
    assert server_settings(forman)["policy_args"] == {"cab": {"bridge_definition": "forman"}}
    assert server_settings(budget)["budget_tokens"] == 1024
    assert "sparsity" not in server_settings(budget)


def test_what_varies_has_a_table_of_its_own(stub_servers, tmp_path):
    vary = {"load.output_length": [3, 4]}
    arguments = study(tmp_path, rates=[50], seeds=[0], methods=["dense"], vary=vary)
    assert main(arguments) == 0
    folder = tmp_path / "out" / "demo"
    for length in (3, 4):
        point = folder / f"load.output-length={length}"
        record = json.loads((point / "dense_s0.0_rate50_seed0.json").read_text())
        assert record["requests"]["output_tokens"] == [length] * 6
        assert (point / "report.md").is_file()
        assert f"(load.output-length={length}/report.md)" in (folder / "report.md").read_text()
    assert main(["report", str(folder)]) == 0


def test_a_file_that_is_no_study(tmp_path):
    (tmp_path / "s.yaml").write_text("a: [")
    with pytest.raises(UsageError, match="cannot read the study"):
        ServingStudy.read(tmp_path / "s.yaml")
    with pytest.raises(UsageError, match="No such file"):
        ServingStudy.read(tmp_path / "t.yaml")


def test_the_committed_studies_are_valid():
    folder = Path(__file__).parents[2] / "scripts" / "studies" / "serving"
    studies = [ServingStudy.read(path) for path in sorted(folder.glob("*.yaml"))]
    assert studies
    assert all(run.measurement.load.num_requests > 0 for s in studies for run in s.runs())
