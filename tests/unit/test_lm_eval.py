"""The study through lm-eval: its plan, its tasks' files, what it reads, what it keeps, its table.

lm-eval itself is not there: it has an environment of its own, and made-up files stand for it.
"""

import importlib
import json
import math
import os
import stat
import sys
from collections import Counter
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from harness.bench.lm_eval_table import BITS, FOUND, lm_eval_table
from harness.errors import UsageError
from harness.inputs.tokens import load_tokenizer
from harness.records.files import read_json, write_json
from harness.resources.server import ServerError

FOLDER = Path(__file__).resolve().parents[2] / "scripts" / "lm_eval"
METHODS = ("dense", "streaming", "h2o", "cab")


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def module(name):
    """A module of scripts/lm_eval."""
    return importlib.import_module(name)


def test_needles_share_a_server_and_passages_have_their_own():
    plan = module("planned")
    runs = plan.planned(plan.TASKS, METHODS, [0.5, 0.9])
    assert len(runs) == len({run.name for run in runs}) == 14
    served = dict(plan.by_server(runs))
    assert len(served) == 7
    assert next(iter(served)) == ("dense", 0.0)
    first = [run.name for run in served["dense", 0.0]]
    assert first[0] == "kv_needle_dense_s0"
    assert [name for name in first if "passages" in name] == ["kv_passages_dense_s0"]
    assert [run.name for run in served["cab", 0.9]] == ["kv_passages_cab_s0.9"]
    assert list(chain.from_iterable(served.values())) == runs


def test_only_requests_for_text_carry_settings():
    plan = module("planned")
    settings = {"kv_policy": "h2o", "kv_sparsity": 0.9}
    assert plan.Run("kv_needle", "h2o", 0.9).request_settings == settings
    assert plan.Run("kv_needle", "dense", 0.0).request_settings == {}
    assert plan.Run("kv_passages", "h2o", 0.9).request_settings == {}


@pytest.mark.parametrize(
    ("methods", "sparsities", "reason"),
    [
        (["h2o", "h2o"], [0.5], "--methods names something twice"),
        (["h2o"], [0.5, 0.5], "--sparsity names something twice"),
        (["h2o"], [1.0], "must lie between 0 and 1"),
        (["h3o"], [0.5], "--methods h3o is no policy; use .*h2o"),
    ],
)
def test_a_wrong_plan_is_refused(methods, sparsities, reason):
    plan = module("planned")
    with pytest.raises(UsageError, match=reason):
        plan.planned(plan.TASKS, methods, sparsities)


def test_the_server_scores_in_chunks_and_shares_nothing():
    flags = module("planned").serve_flags(
        ("cab", 0.9), name="m", context_length=1088, score_chunk=64
    )
    line = " ".join(flags)
    assert "--policy cab --sparsity 0.9 --score-chunk 64 --max-model-len 1088" in line
    assert "--no-enable-prefix-caching" in flags


@pytest.fixture
def drawn(smollm2):
    tokenizer = load_tokenizer(smollm2)
    text = " ".join(f"The {word} of number {i} is here." for i in range(200) for word in ("sea",))
    return tokenizer, [tokenizer(text).input_ids]


def test_the_tasks_files_repeat_by_seed(drawn, tmp_path):
    tasks = module("local_tasks")
    first = tasks.write_tasks(tmp_path / "a", *drawn, 4, 256, 0)
    assert first == tasks.write_tasks(tmp_path / "b", *drawn, 4, 256, 0)
    other = tasks.write_tasks(tmp_path / "c", *drawn, 4, 256, 1)
    assert first.keys() == {"kv_needle", "kv_passages"}
    assert all(first[task] != other[task] for task in first)


def test_a_row_fits_and_has_its_answer(drawn, tmp_path):
    tokenizer, _ = drawn
    module("local_tasks").write_tasks(tmp_path, *drawn, 4, 256, 0)
    needles, passages = (
        [json.loads(line) for line in (tmp_path / f"{task}.jsonl").read_text().splitlines()]
        for task in ("kv_needle", "kv_passages")
    )
    assert len(needles) == len(passages) == 4
    for row in needles:
        assert row["answer"] in row["prompt"]
        assert row["tokens"] == len(tokenizer(row["prompt"]).input_ids)
        assert 200 < row["tokens"] <= 256 - 32
    for row in passages:
        assert row["tokens"] == len(tokenizer(row["text"]).input_ids)
        assert 200 < row["tokens"] <= 254
    assert len({row["text"] for row in passages}) == 4


@pytest.mark.parametrize(("length", "reason"), [(20, "no prompt|raise it"), (90_000, "lower")])
def test_lengths_that_do_not_fit_are_refused(drawn, tmp_path, length, reason):
    with pytest.raises(UsageError, match=reason):
        module("local_tasks").write_tasks(tmp_path, *drawn, 4, length, 0)


def test_a_tasks_file_is_the_one_that_is_made():
    plan = module("planned")
    kinds = {plan.NEEDLE: "generate_until", plan.PASSAGES: "loglikelihood_rolling"}
    assert {path.stem for path in (FOLDER / "tasks").iterdir()} == set(plan.TASKS)
    for task in plan.TASKS:
        asked = yaml.safe_load((FOLDER / "tasks" / f"{task}.yaml").read_text())
        assert asked["task"] == task
        assert asked["output_type"] == kinds[task]
        assert asked["dataset_kwargs"]["data_files"] == {"test": f"{task}.jsonl"}


PAGE = """\
vllm:kv_eviction_blocks_evicted_total{{engine="0"}} {blocks}
vllm:kv_eviction_decisions_total{{engine="0"}} {blocks}
vllm:kv_eviction_requests_total{{engine="0",policy="dense"}} 2.0
vllm:kv_eviction_requests_total{{engine="0",policy="h2o"}} {requests}
vllm:kv_eviction_effective_sparsity_sum{{engine="0"}} {sparsity}
vllm:kv_eviction_effective_sparsity_count{{engine="0"}} {requests}
vllm:kv_eviction_peak_blocks_sum{{engine="0"}} {blocks}
vllm:kv_eviction_peak_blocks_count{{engine="0"}} {requests}
vllm:kv_eviction_live_share{{engine="0"}} 0.5
vllm:prompt_tokens_total{{engine="0"}} {blocks}
vllm:e2e_request_latency_seconds_count{{engine="0"}} 7.0
"""


def test_counters_are_read_until_they_rest(monkeypatch):
    evictions = module("evictions")
    monkeypatch.setattr(evictions.time, "sleep", lambda seconds: None)
    pages = [PAGE.format(blocks=b, requests=1, sparsity=0) for b in (1, 5, 5, 9)]
    found = evictions.counters("http://x", read=lambda url: pages.pop(0))
    assert found["kv_eviction_blocks_evicted"] == 5
    assert len(pages) == 1
    assert "kv_eviction_live_share" not in found
    assert found["prompt_tokens"] == 5


def test_what_a_run_saw_is_what_counters_grew_by(monkeypatch):
    evictions = module("evictions")
    monkeypatch.setattr(evictions.time, "sleep", lambda seconds: None)
    before, after = (
        evictions.counters("x", read=lambda url, page=page: page)
        for page in (
            PAGE.format(blocks=10, requests=1, sparsity=0.25),
            PAGE.format(blocks=40, requests=3, sparsity=1.25),
        )
    )
    seen = evictions.between(before, after, 32)
    assert seen == {
        "blocks_evicted": 30,
        "tokens_evicted": 960,
        "decisions": 30,
        "requests": {"h2o": 2},
        "requests_ended": 2,
        "mean_effective_sparsity": 0.5,
        "mean_peak_blocks": 15.0,
        "prompt_tokens": 30,
    }
    evictions.check(seen, "h2o", 2)
    assert evictions.between(after, after, 32)["mean_effective_sparsity"] is None


@pytest.mark.parametrize(
    ("blocks", "requests", "method", "reason"),
    [
        (0, {"h2o": 2}, "h2o", "evicted nothing under h2o"),
        (3, {"dense": 2}, "dense", "evicted 3 blocks under dense"),
        (3, {"cab": 1, "h2o": 1}, "h2o", "2 requests were to follow h2o, .*'cab': 1"),
        (3, {"h2o": 3}, "h2o", "2 requests were to follow h2o, .*'h2o': 3"),
        (3, {}, "h2o", "2 requests were to follow h2o, and the server counted none"),
    ],
)
def test_a_run_that_saw_something_else_fails(blocks, requests, method, reason):
    evictions = module("evictions")
    with pytest.raises(evictions.NothingSeen, match=reason):
        evictions.check({"blocks_evicted": blocks, "requests": requests}, method, 2)


def test_settings_go_with_the_requests():
    cli = module("lm_eval_cli")
    common = {"name": "m", "base_url": "http://h:1", "length": 256, "output": "results/x"}
    flags = cli.arguments("kv_needle", settings={"kv_policy": "h2o"}, **common)
    assert json.loads(flags[flags.index("--gen_kwargs") + 1]) == {
        "vllm_xargs": {"kv_policy": "h2o"}
    }
    model = json.loads(flags[flags.index("--model_args") + 1])
    assert model["base_url"] == "http://h:1/v1/completions"
    assert model["max_length"] == 256
    assert "--gen_kwargs" not in cli.arguments("kv_passages", settings={}, **common)


def script(path, text):
    """An executable that stands for lm-eval's interpreter."""
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_missing_environment_is_told_with_the_remedy(tmp_path):
    with pytest.raises(UsageError, match="make it with scripts/lm_eval/setup"):
        module("lm_eval_cli").versions(tmp_path / "none")


def test_an_lm_eval_that_fails_is_told_by_its_log(tmp_path):
    cli = module("lm_eval_cli")
    python = script(tmp_path / "python", "raise SystemExit('ValueError: no such task')")
    with pytest.raises(cli.Failed, match=r"status 1: ValueError: no such task \(log: "):
        cli.run([], tmp_path / "work", "results/x", tmp_path / "logs" / "x.log", python)


def test_lm_eval_runs_where_its_files_are_and_asks_no_hub(tmp_path):
    cli = module("lm_eval_cli")
    told = "import os, sys; print(os.getcwd(), os.environ['HF_HUB_OFFLINE'], sys.argv[1:])"
    python = script(tmp_path / "python", told)
    stale = tmp_path / "work" / "results" / "x" / "results_old.json"
    write_json(stale, {})
    cli.run(["--flag"], tmp_path / "work", "results/x", tmp_path / "x.log", python)
    assert not stale.exists()
    assert (tmp_path / "work" / "tasks" / "kv_needle.yaml").is_file()
    log = (tmp_path / "x.log").read_text()
    assert log.split()[:2] == [os.path.realpath(tmp_path / "work"), "1"]
    assert "['-m', 'lm_eval', '--flag']" in log


def written(folder, task, samples, scores):
    """What lm-eval leaves in its folder."""
    write_json(
        folder / "m" / "results_2026-01-01.json",
        {"results": {task: scores}, "pretty_env_info": "a machine", "lm_eval_version": "1"},
    )
    lines = "".join(f"{json.dumps(sample)}\n" for sample in samples)
    (folder / "m" / f"samples_{task}_2026-01-01.jsonl").write_text(lines)


def test_results_are_read_without_the_machine_and_without_prompts(tmp_path):
    cli = module("lm_eval_cli")
    needle = {"doc": {"prompt": "long", "tokens": 9}, "resps": [[" 1234567."]], "exact_match": 1.0}
    written(tmp_path / "n", "kv_needle", [{"doc_id": 1, **needle}, {"doc_id": 0, **needle}], {})
    result, samples = cli.read(tmp_path / "n", "kv_needle")
    assert result == {"results": {"kv_needle": {}}, "lm_eval_version": "1"}
    assert [sample["doc"] for sample in samples] == [0, 1]
    assert samples[0] == {"doc": 0, "tokens": 9, "answer": " 1234567.", "found": 1.0}
    for response in (-12.34567, [-12.34567, False]):
        passage = {"doc_id": 0, "doc": {"text": "long", "tokens": 9}, "resps": [[response]]}
        written(tmp_path / "p", "kv_passages", [passage], {})
        _, (sample,) = cli.read(tmp_path / "p", "kv_passages")
        assert sample == {"doc": 0, "tokens": 9, "log_likelihood": -12.3457}
    with pytest.raises(cli.Failed, match="left no result"):
        cli.read(tmp_path / "none", "kv_needle")


@pytest.fixture
def study(smollm2, tmp_path, monkeypatch):
    """``measure.main`` over servers and an lm-eval that are made up, and what was started."""
    measure, cli, evictions = (module(n) for n in ("measure", "lm_eval_cli", "evictions"))
    started = SimpleNamespace(servers=[], runs=[], fail=None, counts=Counter())

    @contextmanager
    def serving(command, port, log):
        started.servers.append(command[command.index("--policy") + 1])
        yield SimpleNamespace(base_url=f"http://127.0.0.1:{port}")

    def run(flags, work, output, log):
        name = Path(output).name
        if started.fail == name:
            raise cli.Failed("lm-eval ended with status 1: it was told to")
        started.runs.append(name)
        task = flags[flags.index("--tasks") + 1]
        row = {"doc_id": 0, "doc": {"tokens": 200}, "resps": [[-400.0]], "exact_match": 1.0}
        written(work / output, task, [row], {FOUND: 1.0, BITS: 1.0})
        method = name.split("_")[2]
        started.counts["kv_eviction_blocks_evicted"] += 0 if method == "dense" else 8
        started.counts[f"kv_eviction_requests:{method}"] += 1

    def counters(base_url):
        return dict(started.counts)

    monkeypatch.setattr(measure, "serving", serving)
    monkeypatch.setattr(cli, "run", run)
    monkeypatch.setattr(cli, "versions", lambda: {"lm_eval": "0.0.1"})
    monkeypatch.setattr(evictions, "counters", counters)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"The sea of number {i} is here." for i in range(300)))
    flags = [
        "--output",
        str(tmp_path / "out"),
        "--model",
        str(smollm2),
        "--methods",
        "dense",
        "h2o",
    ]
    flags += ["--dataset", f"text:{text}", "--sparsity", "0.5", "--num-samples", "2"]
    flags += ["--context-length", "256"]

    def main(*more):
        monkeypatch.setattr(sys, "argv", ["measure.py", *flags, *more])
        return measure.main()

    return main, started, tmp_path / "out"


def test_a_study_leaves_a_record_of_each_run_and_resumes(study, capsys):
    main, started, out = study
    assert main() == 0
    assert started.servers == ["dense", "h2o"]
    assert len(started.runs) == 4
    assert "kv_needle h2o 0.5: exact_match 1, bits_per_byte 1; 8 blocks" in capsys.readouterr().out
    record = read_json(out / "kv_needle_h2o_s0.5.json")
    assert record["settings"]["request"] == {"kv_policy": "h2o", "kv_sparsity": 0.5}
    assert record["settings"]["server"] == {"policy": "dense", "sparsity": 0.0}
    assert record["evicted"]["tokens_evicted"] == 8 * 32
    assert record["counters"]["after"]["kv_eviction_blocks_evicted"] == 8
    assert str(out) not in json.dumps(record), "a record names no folder of its machine"
    (out / "kv_needle_h2o_s0.5.json").write_text("{")
    assert main() == 0
    assert started.runs[4:] == ["kv_needle_h2o_s0.5"], "all others were there"
    assert main("--seed", "1") == 0
    assert len(started.runs) == 9, "other settings are measured anew"


def test_a_run_that_fails_loses_no_other(study, capsys):
    main, started, out = study
    started.fail = "kv_passages_h2o_s0.5"
    assert main() == 1
    told = capsys.readouterr().err
    assert (
        told
        == "lm-eval study: lm-eval ended with status 1: it was told to; run it again to go on\n"
    )
    assert len(list(out.glob("*.json"))) == 3
    started.fail = None
    assert main() == 0
    assert started.runs.count("kv_needle_dense_s0") == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [(UsageError("x"), 2), (ServerError("x"), 1), (KeyboardInterrupt(), 130)],
)
def test_errors_are_a_sentence_and_a_status(study, monkeypatch, capsys, error, status):
    main, _, _ = study

    def serving(*arguments):
        raise error

    monkeypatch.setattr(module("measure"), "serving", serving)
    assert main() == status
    assert len(capsys.readouterr().err.splitlines()) == 1


def made_up(task, method, sparsity, shift, **changes):
    scores = {FOUND: 0.75} if task == "kv_needle" else {BITS: 1.0 + shift}
    sample = {"kv_needle": {"found": 1.0}, "kv_passages": {}}[task]
    losses = [2.0 + shift, 3.0 + shift + 0.01 * bool(shift)]
    return {
        "kind": "lm-eval",
        "timestamp": "2026-01-02T03:04:05+00:00",
        "data_sha256": f"of {task}",
        "settings": {
            "task": task,
            "method": method,
            "sparsity": sparsity,
            "server": {},
            "request": {},
            "model": "m",
            "text": {"dataset": "canterbury"},
            "score_chunk": 64,
            "block_size": 32,
        },
        "scores": scores,
        "evicted": {
            "blocks_evicted": round(2000 * sparsity),
            "mean_effective_sparsity": sparsity,
        },
        "samples": [
            {"doc": i, "tokens": 1000 + i, "log_likelihood": -(1000 + i) * loss, **sample}
            for i, loss in enumerate(losses)
        ],
        "versions": {"vllm": "0.32.0", "torch": "2.13.0"},
        "lm_eval_versions": {"lm_eval": "0.4.13"},
        "hardware": {"cpu": "made up", "cores": 1},
        "code": "0123456789abcdef",
        **changes,
    }


@pytest.fixture
def records(tmp_path):
    for method, sparsity, shift in (("dense", 0.0, 0.0), ("h2o", 0.9, 0.1), ("cab", 0.5, 0.05)):
        for task in ("kv_needle", "kv_passages"):
            path = tmp_path / f"{task}_{method}_s{sparsity:g}.json"
            write_json(path, made_up(task, method, sparsity, shift))
    return tmp_path


def test_the_table_has_scores_beside_evictions(records):
    table = lm_eval_table(records, "dense", "h2o", "cab")
    assert "2 prompts of 1,000 to 1,001 tokens and 2 passages of 1,000 to 1,001" in table
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line[:2] == "| "]
    assert [row[:2] for row in rows[1:]] == [["dense", "-"], ["cab", "0.5"], ["h2o", "0.9"]]
    assert rows[1][2:] == ["0.75", "1.000", "-", "0.00 / 0.00", "0", "0"]
    change = f"+{100 * math.expm1(0.105):.1f}%"
    assert rows[3][4].startswith(f"{change} [")
    assert rows[3][5:] == ["0.90 / 0.90", "1,800", "1,800"]
    assert "h2o" not in lm_eval_table(records, "dense", "cab")


def test_a_table_of_too_little_or_too_much_is_refused(records, tmp_path):
    with pytest.raises(UsageError, match="holds no record of lm-eval"):
        lm_eval_table(tmp_path / "none", "dense")
    path = records / "kv_passages_h2o_s0.9.json"
    made = read_json(path)
    for changed, reason in (("code", "of other settings, code"), ("data_sha256", "other prompts")):
        write_json(path, {**made, changed: "other"})
        with pytest.raises(UsageError, match=reason):
            lm_eval_table(records, "dense", "h2o")
    path.unlink()
    with pytest.raises(UsageError, match=r"lacks the record of \('kv_passages', 'h2o', 0.9\)"):
        lm_eval_table(records, "dense", "h2o")
