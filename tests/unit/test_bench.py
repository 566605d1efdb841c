"""Bench studies on stub engines: refusals, the loop, interruption, resuming, reports."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from harness.analysis.bench_aggregate import aggregate_bench
from harness.analysis.roofline import largest_ratio
from harness.cli import main
from harness.errors import UsageError
from harness.measure.batch import warm_up
from harness.resources import batch_engine
from harness.resources.eviction_summary import summary
from harness.study.bench_study import BenchStudy
from harness.sweep import bench as sweep

from ..child import children

ROOT = Path(__file__).parents[2]
STUB = [sys.executable, "-m", "tests.unit.batch_stub"]
ALL_SCORES = {"score_query_stride": 1, "score_layer_stride": 1}
STUDY = {
    "methods": ["stock", "h2o", {"policy": "h2o", "name": "h2o-all", "eviction": ALL_SCORES}],
    "sparsity": [0.9],
    "seeds": [0, 1],
    "engine": {"max_model_len": 512},
    "load": {"num_requests": 4, "prompt_tokens": 448, "output_tokens": 64},
}
KEYS = ("stock_s0.0", "h2o_s0.9", "h2o-all_s0.9")
STEADY = {"kind": "steady", "num_sequences": 4, "prompt_tokens": 64, "output_tokens": [8, 448]}
LIVE = {"policy": "stock", "name": "stock-live", "load": {"output_tokens": [1, 45]}}


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return str(tmp_path / "model")


@pytest.fixture
def stubs(monkeypatch):
    """Let sweeps start stubs; the list has the log of each start."""
    starts = []

    def engine(specification, log, original=batch_engine.batch_engine):
        starts.append(log.stem)
        return original(specification, log)

    monkeypatch.setattr(batch_engine, "worker_command", lambda: STUB)
    monkeypatch.setattr(sweep, "batch_engine", engine)
    monkeypatch.setattr(sweep, "check_batch_engine", lambda specification, num_tokens: None)
    monkeypatch.setattr(sweep, "device_type", lambda: "cpu")
    return starts


@pytest.fixture
def study(model, tmp_path):
    def arguments(*flags, **changes):
        path = tmp_path / "demo.yaml"
        path.write_text(json.dumps({**STUDY, "model": model, **changes}))
        return ["bench", str(path), "--output-dir", str(tmp_path / "out"), *flags]

    return arguments


def bench_record(load, policy, sparsity, kv_cache_tokens=4096, **arguments):
    """What the roofline takes of a batch's record."""
    return {
        "kind": "batch",
        "policy": policy,
        "sparsity": sparsity,
        "budget_tokens": None,
        "kv_cache_tokens": kv_cache_tokens,
        "hardware": {"gpu": "NVIDIA H100 80GB HBM3"},
        "specification": {
            "engine": {"model": "llama-3.1-8b", "arguments": arguments},
            "load": load,
        },
    }


def records(folder):
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*_seed*.json")}


def test_a_study_is_measured_reported_and_skipped(stubs, study, tmp_path, capsys):
    folder = tmp_path / "out" / "demo"
    assert main(study()) == 0
    assert stubs == list(KEYS), "an engine each: stock, sampled scores, all scores"
    found = records(folder)
    assert set(found) == {f"{key}_seed{seed}" for key in KEYS for seed in (0, 1)}
    record = found["h2o_s0.9_seed1"]
    assert (record["kind"], record["method"], record["policy"]) == ("batch", "h2o", "h2o")
    assert record["output_tokens_per_second"] == pytest.approx(256 / 0.55)
    assert record["effective_sparsity"] == 0.75  # 4 of 16 blocks always stay
    small = {"warm_up_requests": 2, "warm_up_output_tokens": 8}
    assert record["specification"]["load"] == {**STUDY["load"], **small}, "as in older records"
    assert record["specification"]["engine"]["eviction"]["score_query_stride"] == 8
    assert found["stock_s0.0_seed0"]["specification"]["engine"]["eviction"] is None
    report = (folder / "report.md").read_text()
    rows = [line for line in report.splitlines() if line.startswith("| 4 x (448 + 64)")]
    assert [row.split(" | ")[1] for row in rows] == ["stock", "h2o", "h2o all"]
    assert "| 0.9 (0.75) | 489 | 2.00x | 2.000x [2.000, 2.000] |" in rows[1]
    results = json.loads((folder / "aggregated_results.json").read_text())
    assert list(results) == list(KEYS)
    assert results["h2o_s0.9"]["against_stock"]["num_runs"] == 2
    (session,) = json.loads((folder / "experiment.json").read_text())["sessions"]
    assert (session["engine_starts"], session["runs_done"]) == (3, 6)
    capsys.readouterr()
    assert main(study()) == 0
    assert "6 runs were there already" in capsys.readouterr().out
    assert len(stubs) == 3
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.md").read_text().count("\n") >= report.count("\n")


def test_rounds_start_every_engine_anew_for_each_seed(stubs, study):
    assert main(study(rounds=True)) == 0
    assert stubs == [*KEYS, *(f"{key}.2" for key in KEYS)]


def test_equal_engines_start_apart_where_asked(stubs, study, tmp_path):
    again = {"policy": "stock", "name": "stock-again", "start": 2}
    streaming = {"policy": "streaming", "sparsity": [0.5], "budget_tokens": [128]}
    assert main(study(methods=["stock", again, "h2o", streaming], seeds=[0])) == 0
    assert stubs == ["stock_s0.0", "stock-again_s0.0", "h2o_s0.9"]
    keys = [*stubs, "streaming_s0.5", "streaming_b128"]
    results = json.loads((tmp_path / "out" / "demo" / "aggregated_results.json").read_text())
    assert list(results) == keys
    assert results["stock-again_s0.0"]["against_stock"]["mean"] == 1.0


def test_scores_are_beside_streaming_of_the_same_engine(stubs, study, tmp_path):
    own = {"eviction": {"score_prompt_stride": 8}}
    eighth = [{"policy": p, "name": f"{p}-8", **own} for p in ("streaming", "h2o")]
    assert main(study(methods=["streaming", "h2o", *eighth])) == 0
    found = list(records(tmp_path / "out" / "demo").values())
    speeds = {"streaming": 100.0, "h2o": 90.0, "streaming-8": 50.0, "h2o-8": 48.0}
    for record in found:
        record["output_tokens_per_second"] = speeds[record["method"]] * (1 + record["seed"])
    beside = {e["method"]: e["against_streaming"] for e in aggregate_bench(found).values()}
    assert beside.pop("streaming") is beside.pop("streaming-8") is None
    ratios = {method: ratio["mean"] for method, ratio in beside.items()}
    assert ratios == {"h2o": pytest.approx(0.9), "h2o-8": pytest.approx(0.96)}
    assert all(ratio["num_runs"] == 2 for ratio in beside.values())


def test_what_varies_has_a_table_of_its_own_and_a_study_may_have_a_name(stubs, study, tmp_path):
    vary = {"load.output_tokens": [8, 16]}
    arguments = study(vary=vary, name="named", methods=["stock"], seeds=[0])
    assert main(arguments) == 0
    folder = tmp_path / "out" / "named"
    for tokens in (8, 16):
        point = f"load.output-tokens={tokens}"
        assert records(folder / point)["stock_s0.0_seed0"]["output_tokens"] == 4 * tokens
        assert f"({point}/report.md)" in (folder / "report.md").read_text()
    assert main(["report", str(folder)]) == 0


def test_a_steady_load_and_stock_at_as_many_live_tokens(stubs, study, tmp_path):
    settings = {"load": STEADY, "methods": ["stock", LIVE, "h2o"]}
    assert main(study(**settings)) == 0
    assert stubs == ["stock_s0.0", "h2o_s0.9"], "another load needs no other engine"
    folder = tmp_path / "out" / "demo"
    record = records(folder)["stock-live_s0.0_seed1"]
    assert (record["kind"], record["effective_sparsity"]) == ("steady", 0.0)
    assert record["specification"]["load"] == {
        **STEADY,
        "output_tokens": [1, 45],
        "settle_seconds": 10.0,
        "measured_seconds": 40.0,
    }
    base = records(folder)["h2o_s0.9_seed0"]
    assert base["effective_sparsity"] is None, "lengths differ"
    assert "study_load" not in base["specification"]
    assert record["specification"]["study_load"] == base["specification"]["load"]
    results = json.loads((folder / "aggregated_results.json").read_text())
    h2o = results["h2o_s0.9"]
    assert h2o["against_stock"]["mean"] == pytest.approx(2 * (20 / 10.5 * 21 / 11.5) ** 0.5)
    assert h2o["step_against_stock"]["mean"] == pytest.approx((10.5 / 10 * 11.5 / 11) ** 0.5)
    assert results["stock-live_s0.0"]["load"]["output_tokens"] == [1, 45]
    rows = [r for r in (folder / "report.md").read_text().splitlines() if r.startswith("| 4 x (")]
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| 4 x (64 + 8 to 448)", "stock"],
        ["| 4 x (64 + 1 to 45)", "stock live"],
        ["| 4 x (64 + 8 to 448)", "h2o"],
    ]
    assert "| -2.0% to +2.0% | 11.00 (sd 0.71) | +4.8% | 4 | 40% | 0 | 0.03 | 0.00 |" in rows[2]
    host = (folder / "report.md").read_text().partition("What the thread")[2].splitlines()[2:]
    work = "0.00 | 0.10 | 0.20 | 0.30 | 0.40 | 1.00"
    assert host[4].startswith(f"| h2o | 0.9 | 12.00 | {work} | 0.60 | 0.50 | 0.70 | 0.80 | 0.90 |")
    assert main(study(**settings)) == 0
    assert len(stubs) == 2, "all is there"


def test_a_load_of_a_methods_own_hides_no_other_study(stubs, study, tmp_path, capsys):
    assert main(study(load=STEADY, methods=["stock", LIVE], seeds=[0])) == 0
    folder = tmp_path / "out" / "demo"
    assert main(study(load=STEADY, methods=["h2o"], seeds=[0])) == 0, "a method of the same study"
    other = {**STEADY, "num_sequences": 5}
    assert main(study(load=other, methods=["cab"], seeds=[0])) == 2
    assert "load.num_sequences 4 there, 5 here" in capsys.readouterr().err
    path = folder / "stock-live_s0.0_seed0.json"
    record = json.loads(path.read_text())
    record["specification"]["study_load"]["num_sequences"] = 5
    path.write_text(json.dumps(record))
    assert main(["report", str(folder)]) == 2
    assert "mixes records of different loads" in capsys.readouterr().err


def test_a_batch_may_be_a_methods_own_too(stubs, study, tmp_path):
    half = {"policy": "stock", "name": "half", "load": {"num_requests": 2}}
    assert main(study(methods=["stock", half], seeds=[0])) == 0
    report = (tmp_path / "out" / "demo" / "report.md").read_text()
    assert "| 4 x (448 + 64) | stock |" in report
    assert "| 2 x (448 + 64) | half |" in report


def test_what_sharing_prefixes_is_worth(stubs, study, tmp_path, capsys):
    uncached = {"policy": "stock", "name": "stock-uncached", "prefix_caching": False}
    settings = {"methods": ["stock", uncached, "h2o"], "prefix_caching": True}
    load = {**STUDY["load"], "shared_tokens": 400}
    assert main(study(**settings, load=load)) == 0
    assert stubs == ["stock_s0.0", "stock-uncached_s0.0", "h2o_s0.9"]
    folder = tmp_path / "out" / "demo"
    found = records(folder)
    record = found["h2o_s0.9_seed1"]
    assert (record["cached_tokens"], record["prompt_tokens"]) == (1200, 1792)
    assert record["specification"]["load"]["shared_tokens"] == 400
    assert record["specification"]["engine"]["prefix_caching"] is True
    off = found["stock-uncached_s0.0_seed1"]
    assert off["cached_tokens"] == 0
    assert "prefix_caching" not in off["specification"]["engine"], "as in older records"
    report = (folder / "report.md").read_text()
    assert "4 requests of 448 random tokens, the first 400 of them shared, all there" in report
    rows = [r for r in report.splitlines() if r.startswith(("| load", "| 4 x (448 + 64), 400 s"))]
    assert [row.split(" | ")[6] for row in rows] == ["hits", "67.0%", "-", "67.0%"]
    assert "of stock" in rows[0]
    assert "*hits*: the share of the prompts' tokens that came from the prefix cache" in report
    capsys.readouterr()
    assert main(study(methods=["stock"], seeds=[0], load=load)) == 2
    assert "engine.prefix_caching True there, None here" in capsys.readouterr().err


def test_a_chat_has_turns(stubs, study, tmp_path):
    load = {"num_requests": 2, "prompt_tokens": 100, "output_tokens": 64}
    turns = {"turns": 3, "turn_tokens": 60}
    assert main(study(load={**load, **turns}, prefix_caching=True)) == 0
    folder = tmp_path / "out" / "demo"
    record = records(folder)["h2o_s0.9_seed0"]
    assert record["seconds_by_turn"] == [0.5, 0.5, 0.5]
    assert (record["seconds"], record["output_tokens"]) == (1.5, 2 * 64 * 3)
    assert record["effective_sparsity"] is None, "a conversation's requests differ in length"
    report = (folder / "report.md").read_text()
    assert "| 2 x (100 + 64), 3 turns | h2o | 0.9 |" in report
    assert "in each of 3 turns, where a prompt is all that was said and 60 new tokens" in report


def test_a_method_of_a_search_is_its_engines(stubs, study, tmp_path):
    """vLLM's beam search hands no settings of requests on."""
    shares = {"local": 0.5, "bridge": 0.0, "importance": 0.5}
    own = {"policy": "cab", "name": "mine", "granularity": "token", "args": shares}
    load = {**STUDY["load"], "beam_width": 4}
    settings = {"methods": ["stock", "h2o", own], "load": load, "prefix_caching": True}
    assert main(study(**settings)) == 0
    assert stubs == ["stock_s0.0", "h2o_s0.9", "mine_s0.9"], "an engine each"
    folder = tmp_path / "out" / "demo"
    found = {name: r["specification"]["engine"]["eviction"] for name, r in records(folder).items()}
    assert found["stock_s0.0_seed0"] is None
    h2o, cab = found["h2o_s0.9_seed0"], found["mine_s0.9_seed0"]
    assert (h2o["policy"], h2o["sparsity"], h2o["granularity"]) == ("h2o", 0.9, "default")
    assert (cab["policy"], cab["granularity"]) == ("cab", "token")
    assert cab["policy_args"] == {"cab": shares}
    report = (folder / "report.md").read_text()
    assert "| 4 x (448 + 64), 4 beams | mine | 0.9 |" in report, "nothing is said of blocks"
    assert "in each of 4 beams: vLLM's beam search asks for every token of a beam by a" in report


def test_warm_ups_have_tokens_of_no_batch():
    asked = []
    engine = SimpleNamespace(warm=[], run=lambda load, seed, settings: asked.append((load, seed)))
    load = {**STUDY["load"], "turns": 3, "turn_tokens": 1, "shared_tokens": 448}
    runs = BenchStudy.parse({"load": load, "methods": ["stock"], "seeds": [7, 8]}).runs()
    for run in runs:
        warm_up(run, engine)
    ((small, seed),) = asked
    assert seed >= 2**63, "above every seed of a study"
    assert (small.num_requests, small.output_tokens, small.turns) == (2, 8, 2)
    assert (small.prompt_tokens, small.shared_tokens) == (448, 448), "hits are warm too"


def test_records_of_loads_that_share_have_no_roofline():
    load = {"num_requests": 4, "prompt_tokens": 64, "output_tokens": 8}
    bounds = [
        largest_ratio(bench_record(own, "h2o", 0.9), bench_record(own, "stock", 0.0))
        for own in (load, {**load, "shared_tokens": 1}, {**load, "turns": 2, "turn_tokens": 1})
    ]
    assert bounds[0] is not None
    assert bounds[1:] == [None, None], "the formula computes every token"


def test_the_roofline_knows_how_many_bytes_a_token_takes():
    """Where memory moves all the time, half the bytes in the same pool are half the time."""
    load = {"num_requests": 64, "prompt_tokens": 1, "output_tokens": 10**6}
    stock = bench_record(load, "stock", 0.0)
    tokens = {"kv_cache_tokens": 8192}
    narrow = bench_record(load, "stock", 0.0, **tokens, kv_cache_dtype="fp8")
    assert largest_ratio(stock, stock) == 1.0
    assert largest_ratio(bench_record(load, "stock", 0.0, **tokens), stock) == pytest.approx(1.0)
    long = {**load, "num_requests": 2, "output_tokens": 10**7}
    ratio = largest_ratio(
        bench_record(long, "stock", 0.0, kv_cache_dtype="fp8"), bench_record(long, "stock", 0.0)
    )
    assert ratio == pytest.approx(2.0, rel=0.05)
    assert largest_ratio(narrow, stock) > 1.0


def test_a_method_may_have_engine_arguments_of_its_own(stubs, study, tmp_path, capsys):
    narrow = {"policy": "stock", "name": "stock-fp8", "engine": {"kv_cache_dtype": "fp8"}}
    assert main(study(methods=["stock", narrow, "h2o"], seeds=[0])) == 0
    assert stubs == ["stock_s0.0", "stock-fp8_s0.0", "h2o_s0.9"], "an engine each"
    found = records(tmp_path / "out" / "demo")
    arguments = {key: r["specification"]["engine"]["arguments"] for key, r in found.items()}
    assert arguments == {
        "stock_s0.0_seed0": {"max_model_len": 512},
        "stock-fp8_s0.0_seed0": {"max_model_len": 512, "kv_cache_dtype": "fp8"},
        "h2o_s0.9_seed0": {"max_model_len": 512},
    }
    capsys.readouterr()
    for engine, sentence in (
        ({"block_size": 16}, "engine.block_size follows from other settings"),
        ({"max_model_len": 100}, "512 tokens at its end, more than engine.max_model_len 100"),
        (3, "engine of method"),
    ):
        assert main(study(methods=["stock", {**narrow, "engine": engine}], seeds=[0])) == 2
        assert sentence in capsys.readouterr().err


def test_a_steady_record_without_a_field_is_measured_again(stubs, study, tmp_path, capsys):
    arguments = study(load=STEADY, methods=["stock"], seeds=[0])
    assert main(arguments) == 0
    path = tmp_path / "out" / "demo" / "stock_s0.0_seed0.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in record.items() if k != "sub_windows"}))
    assert main(arguments) == 0
    assert "cannot be read; its run is measured again" in capsys.readouterr().err
    assert "sub_windows" in json.loads(path.read_text())


def test_other_code_is_refused_and_redone(stubs, study, tmp_path, capsys):
    assert main(study(methods=["stock"], seeds=[0])) == 0
    path = tmp_path / "out" / "demo" / "stock_s0.0_seed0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "code": "another"}))
    assert main(study(methods=["stock"], seeds=[0])) == 2
    assert "was made by another code" in capsys.readouterr().err
    assert main(study("--redo", methods=["stock"], seeds=[0])) == 0
    assert json.loads(path.read_text())["code"] != "another"
    changed = {**STUDY["load"], "num_requests": 5}
    assert main(study(methods=["stock"], seeds=[1], load=changed)) == 2
    assert "load.num_requests 4 there, 5 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mode", "failed", "starts", "reason"),
    [
        ("no_start", {"stock_s0.0_seed0", "stock_s0.0_seed1"}, 1, "this model cannot be"),
        ("die", {"stock_s0.0_seed1"}, 1, "ended with status 7: RuntimeError: out of memory"),
        ("error", {"stock_s0.0_seed1"}, 1, "CUDA is unwell"),
        ("policy", {"h2o_s0.9_seed1"}, 1, "policy h2o failed for 1 requests"),
    ],
)
def test_what_fails_is_kept_apart_and_tried_again(
    stubs, study, tmp_path, capsys, mode, failed, starts, reason
):
    method = "h2o" if mode == "policy" else "stock"
    engine = {**STUDY["engine"], "load_format": mode}
    # A warm-up and the first seed come before the third batch.
    assert main(study(methods=[method], engine=engine)) == 1
    assert len(stubs) == starts
    folder = tmp_path / "out" / "demo"
    told = records(folder / "failed")
    assert set(told) == failed
    for record in told.values():
        assert reason in record["reason"]
        assert (record["kind"], record["status"]) == ("batch", "failed")
        assert record["level"] in ("s0.0", "s0.9")
    error = capsys.readouterr().err
    assert reason in error
    assert "Traceback" not in error
    if mode != "no_start":
        assert reason in (folder / "report.md").read_text()
    assert not children()


def test_a_batch_that_never_ends(stubs, study, tmp_path):
    engine = {**STUDY["engine"], "load_format": "slow"}
    assert main(study(methods=["stock"], seeds=[0], engine=engine, batch_timeout_s=1)) == 1
    (failed,) = records(tmp_path / "out" / "demo" / "failed").values()
    assert "did not finish a batch within 1 s" in failed["reason"]
    assert not children()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_leaves_no_process_and_resumes(number, stubs, study, tmp_path, capsys):
    code = (
        "import sys; from harness.resources import batch_engine; from harness.sweep import bench; "
        f"batch_engine.worker_command = lambda: {STUB!r}; bench.device_type = lambda: 'cpu'; "
        "bench.check_batch_engine = lambda *a: None; "
        "from harness.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *study(methods=["stock"])],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SLOW": "1"},
    )
    for line in process.stderr:
        if line.startswith("stock_s0.0, seed 0"):
            break
    time.sleep(0.5)
    its_own = psutil.Process(process.pid).children(recursive=True)
    assert its_own
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted; finished runs are kept, the same command resumes" in error
    assert "Traceback" not in error
    assert not any(child.is_running() for child in its_own)
    assert main(study(methods=["stock"])) == 0
    assert len(records(tmp_path / "out" / "demo")) == 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"metods": []}, "unknown setting 'metods' of a bench study; did you mean 'methods'?"),
        ({"methods": []}, "at least one of methods"),
        ({"methods": "h2o"}, "methods of a bench study must be a list"),
        ({"methods": ["h3o"]}, "h3o"),
        ({"methods": ["h2o", "h2o"]}, "h2o_s0.9_seed0 twice"),
        ({"methods": [{"policy": "h2o", "sparsity": 0.5}]}, "sparsity of method"),
        ({"methods": [{"policy": "h2o", "start": 0}]}, "start of method"),
        ({"methods": [{"policy": "h2o", "eviction": 3}]}, "eviction of method"),
        ({"methods": [{"policy": "h2o", "eviction": {"x": 3}}]}, "unknown eviction setting 'x'"),
        ({"methods": [{"policy": "stock", "eviction": {}}]}, "drop its eviction"),
        ({"methods": [{"policy": "stock", "args": {"a": 1}}]}, "takes no args"),
        ({"seeds": None}, "seeds of a bench study is empty; give a value or remove the line"),
        ({"eviction": {"policy": "h2o"}}, "eviction.policy is set by methods"),
        ({"eviction": {"policy_args": None}}, "policy_args of eviction is empty; give a value"),
        ({"eviction": {"policy_args": 3}}, "policy_args is 3; give a mapping"),
        (
            {"methods": [{"policy": "h2o", "eviction": {"policy_args": None}}]},
            "policy_args of eviction is empty; give a value or remove the line",
        ),
        ({"eviction": {"request_policies": ["cab"]}}, "'h2o' is not offered"),
        ({"sparsity": [1.5]}, "give a number from 0"),
        ({"budget_tokens": [40]}, "give at least 64"),
        ({"seeds": [-1]}, "seeds has -1"),
        ({"seeds": []}, "one of seeds"),
        ({"rounds": 3}, "rounds is 3; give true or false"),
        ({"prefix_caching": 1}, "prefix_caching is 1; give true or false"),
        ({"methods": [{"policy": "h2o", "prefix_caching": 0}]}, "prefix_caching of method"),
        ({"prefix_caching": True, "load": STEADY}, "prefix_caching is for batches"),
        ({"block_size": 0}, "block_size is 0"),
        ({"engine": {"model": "x"}}, "engine.model follows from other settings"),
        ({"engine": {"max_model_len": 511}}, "512 tokens at its end, more than"),
        ({"load": {}}, "load of a bench study has no num_requests"),
        ({"load": {**STUDY["load"], "rate": 3}}, "unknown setting 'rate' of the load"),
        ({"load": {**STUDY["load"], "output_tokens": 0}}, "load.output_tokens is 0"),
        ({"load": {**STUDY["load"], "output_tokens": "8"}}, "output_tokens is '8'"),
        ({"load": {**STUDY["load"], "shared_tokens": -1}}, "shared_tokens is -1; give at least 0"),
        ({"load": {**STUDY["load"], "shared_tokens": 449}}, "449, more than load.prompt_tokens"),
        ({"load": {**STUDY["load"], "turns": 0}}, "load.turns is 0; give at least 1"),
        ({"load": {**STUDY["load"], "beam_width": 0}}, "load.beam_width is 0; give at least 1"),
        (
            {"load": {**STUDY["load"], "beam_width": 2, "turns": 2, "turn_tokens": 1}},
            "load.turns is 2 and load.beam_width 2; a conversation goes on from one answer",
        ),
        (
            {"load": {**STUDY["load"], "beam_width": 11}},
            "load.beam_width is 11, and beam search asks for two log-probs a beam, more than",
        ),
        (
            {"load": {**STUDY["load"], "beam_width": 2}, "engine": {"skip_tokenizer_init": True}},
            "vLLM's beam search asks for a tokenizer; drop engine.skip_tokenizer_init",
        ),
        ({"load": {**STUDY["load"], "turns": 2}}, "load.turn_tokens is 0; each turn after the"),
        ({"load": {**STUDY["load"], "turn_tokens": -1}}, "turn_tokens is -1; give at least 0"),
        ({"load": {**STUDY["load"], "turns": 2, "turn_tokens": 9}}, "585 tokens at its end, more"),
        ({"load": {**STEADY, "kind": "steadi"}}, "load.kind is 'steadi'; give batch or steady"),
        ({"load": {"kind": "steady"}}, "steady load of a bench study has no num_sequences"),
        ({"load": {**STEADY, "output_token": 3}}, "did you mean 'output_tokens'?"),
        ({"load": {**STEADY, "study_load": {}}}, "unknown setting 'study_load' of the steady load"),
        ({"load": {**STEADY, "num_sequences": 0}}, "load.num_sequences is 0; give at least 1"),
        ({"load": {**STEADY, "num_sequences": 1.5}}, "num_sequences is 1.5; give a whole number"),
        ({"load": {**STEADY, "prompt_tokens": 0}}, "load.prompt_tokens is 0; give at least 1"),
        ({"load": {**STEADY, "output_tokens": 64}}, "load.output_tokens is 64; give the shortest"),
        ({"load": {**STEADY, "output_tokens": [8]}}, "load.output_tokens is [8]; give the"),
        ({"load": {**STEADY, "output_tokens": [8, True]}}, "load.output_tokens is [8, True]"),
        ({"load": {**STEADY, "output_tokens": [9, 8]}}, "[9, 8]; give the shortest output"),
        ({"load": {**STEADY, "output_tokens": [0, 8]}}, "[0, 8]; give the shortest output"),
        ({"load": {**STEADY, "output_tokens": [8, 449]}}, "513 tokens at its end, more than"),
        ({"load": {**STEADY, "settle_seconds": -1}}, "load.settle_seconds is -1"),
        ({"load": {**STEADY, "settle_seconds": "1"}}, "settle_seconds is '1'; give a number"),
        ({"load": {**STEADY, "measured_seconds": 0}}, "load.measured_seconds is 0"),
        ({"load": {**STEADY, "measured_seconds": 1e9}}, "is 1000000000.0; give a finite"),
        ({"load": {**STEADY, "measured_seconds": 3590}}, "not less than batch_timeout_s 3600"),
        ({"load": STEADY, "engine": {"max_num_seqs": 3}}, "more than engine.max_num_seqs 3"),
        ({"methods": [{**LIVE, "load": 3}]}, "load of method"),
        ({"methods": [{**LIVE, "load": {"kind": "steady"}}]}, "load.kind is the study's"),
        ({"methods": [{**LIVE, "load": {"rate": 1}}]}, "unknown setting 'rate' of the load"),
        ({"methods": [{**LIVE, "load": {"output_tokens": 0}}]}, "load.output_tokens is 0"),
        ({"methods": [{**LIVE, "load": {"output_tokens": 65}}]}, "513 tokens at its end"),
        ({"vary": {"colour": [1]}}, "no setting that can vary"),
        ({"vary": {"load.output_tokens": [8, 8]}}, "the same value twice"),
        ({"name": "a/b"}, "plain name of a folder"),
        ({"model": "/nowhere"}, "holds no config.json"),
        ({"startup_timeout_s": 0}, "startup_timeout_s is 0"),
    ],
)
def test_bad_studies(changes, sentence, stubs, study, tmp_path, capsys):
    assert main(study(**changes)) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert not stubs


def test_a_folder_without_records_has_no_report(tmp_path, capsys):
    (tmp_path / "experiment.json").write_text(
        '{"study": {"kind": "bench"}, "comparisons": [{"varied": {}, "folder": "."}]}'
    )
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no bench record" in capsys.readouterr().err


def test_the_committed_studies_are_valid(monkeypatch):
    monkeypatch.chdir(ROOT)
    paths = sorted((ROOT / "scripts" / "studies" / "bench").glob("*.yaml"))
    studies = {path.stem: BenchStudy.read(path) for path in paths}
    assert set(studies) == {
        "as_served",
        "beams",
        "beams_gpu",
        "beside_streaming",
        "chat",
        "chat_gpu",
        "chunk",
        "crossover",
        "default",
        "default_real",
        "fp8",
        "headline",
        "key_bridges",
        "key_bridges_cpu",
        "layer_groups",
        "long",
        "long_strides",
        "long_tokens",
        "nothing_evicted",
        "overhead",
        "prefix_sharing",
        "prefix_sharing_gpu",
        "short",
        "steady",
        "steady_long",
        "steady_minutes",
        "steady_ten_minutes",
        "tight",
    }
    beside_streaming = {"beside_streaming", "key_bridges", "key_bridges_cpu", "long_strides"}
    for name, study in studies.items():
        first = "streaming" if name in beside_streaming else "stock"
        assert study.runs()[0].method.policy == first


def test_what_was_evicted_over_a_batch():
    record = {
        "average_blocks": 4.0,
        "effective_sparsity": 0.5,
        "peak_blocks": 6,
        "blocks_evicted": 3,
        "decisions": 2,
        "decision_seconds": 0.1,
    }
    made = summary([record, {**record, "average_blocks": 2.0, "policy_error": "x"}])
    assert (made["average_blocks"], made["peak_blocks"], made["policy_errors"]) == (3.0, 6, 1)
    assert summary([{}, {}]) is None


def test_a_study_that_is_no_file():
    with pytest.raises(UsageError, match="cannot read the study"):
        BenchStudy.read(Path("/nowhere.yaml"))
