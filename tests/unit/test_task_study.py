"""Studies of tasks: settings, refusals, and sweeps on a made-up engine."""

import json

import pytest

from harness.errors import UsageError
from harness.records.stored import read_record
from harness.report.experiment import report_experiment
from harness.resources.scored import UnfaithfulRun
from harness.study.plan import comparisons
from harness.study.settings import Study
from harness.sweep.offline import Sweep

from .made_up_engine import made_up_text, run

SETTINGS = {
    "methods": ["dense", "h2o"],
    "sparsity": [0.5],
    "context_length": 1500,
    "num_runs": 2,
    "tasks": ["niah_single", "long_generation"],
    "task_samples": 6,
    "task_output_tokens": 64,
}
NUM_RUNS = 2 * 2 * 2


@pytest.fixture
def settings(tmp_path):
    return {**SETTINGS, "dataset": made_up_text(tmp_path)}


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "folder" / "my_seed0.jsonl"
    path.parent.mkdir()
    rows = [{"prompt": f"number {i}, is: 123456{i}", "answers": [f"123456{i}"]} for i in range(9)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def planned(settings, tmp_path):
    (point,) = comparisons(Study.parse(settings), tmp_path, "cpu")
    return point.runs


def test_each_task_is_a_run_of_each_method_and_seed(settings, tmp_path, smollm2):
    runs = planned(settings, tmp_path)
    assert {run.kind for run in runs} == {"task"}
    assert [run.file_name for run in runs[:4]] == [
        "dense_s0.0_ctx1500_task0_niah-single.json",
        "h2o_s0.5_ctx1500_task0_niah-single.json",
        "dense_s0.0_ctx1500_task0_long-generation.json",
        "h2o_s0.5_ctx1500_task0_long-generation.json",
    ]
    assert len({run.hash for run in runs}) == NUM_RUNS
    assert len({run.comparison for run in runs}) == 1, "all stand in one table"
    assert runs[1].effective_sparsity == pytest.approx(0.5, abs=0.02)
    specification = runs[0].to_dict()
    assert specification["task"] == {"name": "niah_single", "output_tokens": None, "sha256": None}
    assert (specification["question"], specification["num_samples"]) == ("after", 6)


def test_a_cached_prefix_is_another_engine_and_computed_ones_keep_their_records(
    settings, tmp_path, smollm2
):
    computed = planned(settings, tmp_path)
    assert "prefix_caching" not in computed[0].to_dict()["engine"]
    cached = planned({**settings, "task_prefix": "cached"}, tmp_path)
    assert cached[0].resource.prefix_caching
    assert cached[0].to_dict()["engine"]["prefix_caching"] is True
    assert not {run.hash for run in computed} & {run.hash for run in cached}


def test_perplexity_stands_beside_tasks_where_asked_for(settings, tmp_path, smollm2):
    runs = planned({**settings, "perplexity": True, "throughput": True}, tmp_path)
    kinds = [run.kind for run in runs]
    assert [kinds.count(kind) for kind in ("perplexity", "task", "throughput")] == [4, NUM_RUNS, 4]
    alone = planned({**settings, "tasks": []}, tmp_path)
    assert [r.hash for r in runs if r.kind == "perplexity"] == [r.hash for r in alone]


def test_a_file_is_told_by_its_name_and_content(settings, tmp_path, mine, smollm2):
    (first, *_) = planned({**settings, "tasks": f"jsonl:{mine}"}, tmp_path)
    assert first.file_name == "dense_s0.0_ctx1500_task0_jsonl-my-seed0.jsonl.json"
    assert str(mine.parent) not in str(first.to_dict())
    assert str(mine.parent) not in str(Study.parse({"tasks": [f"jsonl:{mine}"]}).to_dict())
    mine.write_text(mine.read_text() + "\n")
    assert planned({**settings, "tasks": f"jsonl:{mine}"}, tmp_path)[0].hash != first.hash


def test_a_prompt_in_one_chunk_is_evicted_from_before_its_answer(settings, tmp_path, smollm2):
    """Windows in one chunk are not: nothing of them is read after it."""
    served = {**settings, "tasks": ["niah_single"], "prefill_chunk": 1500}
    assert planned(served, tmp_path)
    with pytest.raises(UsageError, match="a window of --context-length 1500 before its last step"):
        planned({**served, "perplexity": True}, tmp_path)
    with pytest.raises(
        UsageError,
        match=r"of --context-length 1500 beside an answer of 32, as 45 blocks of 32 tokens stay; "
        r"give --context-length 2[0-9]{3} or --sparsity 0.1",
    ):
        planned({**served, "sparsity": 0.04}, tmp_path)


def test_an_answer_of_one_token_sees_no_eviction_after_its_prompt(settings, tmp_path, smollm2):
    served = {**settings, "prefill_chunk": 1500}
    file = tmp_path / "one.jsonl"
    file.write_text('{"prompt": "one", "answers": ["two"], "max_tokens": 1}\n')
    for change in (
        {"tasks": ["long_generation"], "task_output_tokens": 1},
        {"tasks": [f"jsonl:{file}"]},
    ):
        with pytest.raises(UsageError, match="would evict nothing from a window"):
            planned({**served, **change}, tmp_path)
    file.write_text('{"prompt": "one", "answers": ["two"], "max_tokens": 2}\n')
    assert planned({**served, "tasks": [f"jsonl:{file}"]}, tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tasks": ["niah_singel"]}, "unknown task 'niah_singel'; did you mean niah_single?"),
        ({"tasks": ["zzz"]}, "give jsonl:FILE or one of: niah_single"),
        ({"tasks": [3]}, "unknown task 3"),
        ({"tasks": ["niah_single", "niah_single"]}, "--tasks names niah-single twice"),
        ({"tasks": ["jsonl:/nowhere.jsonl"]}, "cannot read the task /nowhere.jsonl"),
        ({"task_question": "both"}, "--task-question must be one of: after, before"),
        ({"task_prefix": "hit"}, "--task-prefix must be one of: computed, cached"),
        ({"task_samples": 0}, "--task-samples must be at least 1"),
        ({"task_output_tokens": 1500}, "--task-output-tokens 1500 leaves no prompt"),
        ({"perplexity": "yes"}, "perplexity must be true or false"),
        ({"tasks": [], "perplexity": False}, "nothing to measure"),
        ({"throughput": True}, "give --perplexity beside --tasks"),
        ({"protocol": "decode"}, "tasks are answered; use --protocol chunked"),
        ({"vary": {"tasks": [["niah_single"]]}}, "no setting that can vary"),
    ],
)
def test_refusals(settings, tmp_path, smollm2, change, sentence):
    with pytest.raises(UsageError, match=r"^[^\n]+$") as refusal:
        planned({**settings, **change}, tmp_path)
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"tasks": [], "task_samples": 5}, ["--task-samples has no effect without --tasks"]),
        ({"num_samples": 5}, ["--num-samples has no effect without --perplexity"]),
        ({"num_samples": 5, "perplexity": True}, []),
        (
            {"tasks": ["niah_single"], "task_output_tokens": 5},
            ["--task-output-tokens has no effect without --tasks long_generation or jsonl:FILE"],
        ),
        (
            {"tasks": ["long_generation"], "task_question": "before"},
            [
                "--task-question has no effect without a task of this program's own that asks "
                "something"
            ],
        ),
    ],
)
def test_settings_without_effect_say_so(given, told):
    study = Study.parse({"tasks": SETTINGS["tasks"], **given})
    assert study.without_effect() == told


def test_a_sweep_of_tasks_resumes_and_reports(engines, settings, tmp_path, monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda s, p, **o: p.write_bytes(b""))
    engines.at_run = {3: UnfaithfulRun("took 9 steps")}
    first = run(settings, tmp_path / "e")
    assert (engines.started, first.session.runs_done) == (1, NUM_RUNS - 1)
    report_experiment(tmp_path / "e")
    page = (tmp_path / "e" / "report.md").read_text()
    assert "- `dense_s0.0`, long_generation, of seed 0: took 9 steps" in page
    again = run(settings, tmp_path / "e")
    assert (again.session.runs_skipped, again.session.runs_done) == (NUM_RUNS - 1, 1)
    made = read_record(tmp_path / "e" / "h2o_s0.5_ctx1500_task1_niah-single.json")
    assert (made["kind"], made["task"]) == ("task", "niah_single")
    scores = [sample["score"] for sample in made["samples"]]
    assert made["score"] == pytest.approx(sum(scores) / 6)
    assert 0 < made["score"] < 1
    for sample in made["samples"]:
        assert (sample["answer"] == sample["expected"][0]) == (sample["score"] == 1.0)
        assert 0.98 * 1468 <= sample["prompt_tokens"] <= 1468
        assert sample["eviction"]["blocks_evicted"] == 2
        assert "token_ids" not in sample
    free = read_record(tmp_path / "e" / "h2o_s0.5_ctx1500_task1_long-generation.json")
    assert free["score"] is None
    assert len(free["samples"][0]["token_ids"]) == 64
    ((_, results),) = report_experiment(tmp_path / "e")
    assert results["dense_s0.0"]["task_score"]["mean"] == 1.0
    assert results["h2o_s0.5"]["task_difference"]["mean_difference"] < 0
    assert results["h2o_s0.5"]["free"]["long_generation"]["same_beginning"]["mean"] == 1.0


def test_a_task_may_be_added_but_not_another_question(engines, settings, mine, tmp_path):
    run(settings, tmp_path / "e")
    more = {**settings, "tasks": [*settings["tasks"], f"jsonl:{mine}"]}
    added = run(more, tmp_path / "e")
    assert (added.session.runs_skipped, added.session.runs_done) == (NUM_RUNS, 4)
    record = read_record(tmp_path / "e" / "h2o_s0.5_ctx1500_task0_jsonl-my-seed0.jsonl.json")
    assert record["effective_sparsity"] is None, "prompts differ in length"
    assert len(record["samples"]) == 6
    assert record["samples"][0]["metric"] == "contains"
    for change in ({"task_question": "before"}, {"task_samples": 5}):
        with pytest.raises(UsageError, match="give another --experiment-name"):
            Sweep(Study.parse({**more, **change}), tmp_path / "e")
        other = Study.parse({**settings, **change, "tasks": ["multi_turn"]})
        with pytest.raises(UsageError, match="belongs to another comparison"):
            Sweep(other, tmp_path / "e")
    for path in (tmp_path / "e").glob("*.json"):
        assert str(tmp_path) not in path.read_text()


def test_what_cannot_be_asked_is_refused_before_an_engine_starts(engines, settings, mine, tmp_path):
    for change, sentence in (
        ({"tasks": ["niah_single"], "context_length": 300}, "without any filler"),
        ({"tasks": [f"jsonl:{mine}"], "task_output_tokens": 1490}, "do not fit into --context"),
        ({"tasks": ["niah_single"], "context_length": 50_000}, "fewer than a prompt of"),
    ):
        with pytest.raises(UsageError, match=sentence):
            run({**settings, **change}, tmp_path / "e")
    mine.write_text("[]")
    with pytest.raises(UsageError, match=r"my_seed0.jsonl, line 1: no JSON object"):
        run({**settings, "tasks": [f"jsonl:{mine}"]}, tmp_path / "e")
    assert (engines.started, (tmp_path / "e").exists()) == (0, False)
