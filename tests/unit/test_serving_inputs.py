"""What is refused before anything is sent: one sentence, exit status 2, no request."""

import json
from datetime import datetime

import pytest
import yaml

from harness.bench import client as bench_client
from harness.bench import compare_clients
from harness.cli import main
from harness.client.lengths import Lengths
from harness.client.load_plan import make_plan
from harness.client.load_settings import LoadSpecification
from harness.client.traces import read_trace
from harness.errors import UsageError
from harness.study.serving_study import ServingStudy

from .serving_stub import load, running


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--slo time_to_first_token_ms:inf", "--slo 'time_to_first_token_ms:inf'"),
        ("--slo time_to_first_token_ms:nan", "--slo 'time_to_first_token_ms:nan'"),
        (
            "--slo time_to_first_token_ms:1 time_to_first_token_ms:2",
            "--slo names time_to_first_token_ms twice",
        ),
        ("--kv-sparsity nan", "kv_sparsity is nan; give a number from 0"),
        ("--kv-sparsity inf", "kv_sparsity is inf"),
        ("--kv-policy h20", "unknown policy 'h20'"),
        ("--kv-policy dense --kv-sparsity 0.5", "policy dense never evicts"),
        ("--kv-sparsity 0.5 --kv-budget-tokens 64", "give kv_sparsity or kv_budget_tokens"),
        ("--kv-budget-tokens -3", "kv_budget_tokens is -3"),
        ("--input-length fixed:inf", "length 'fixed:inf'"),
        ("--input-length fixed:nan", "length 'fixed:nan'"),
        ("--input-length fixed:4.5", "length 'fixed:4.5' is not in whole tokens"),
        ("--output-length uniform:1:1e30", "allows more than 10,000,000 tokens"),
        ("--output-length lognormal:10:1000", "allows more than 10,000,000 tokens"),
        ("--output-length normal:10:1e300", "allows more than 10,000,000 tokens"),
        ("--vocab-size -5", "--vocab-size is -5; give a whole number"),
        ("--vocab-size 0", "--vocab-size is 0"),
        ("--timeout inf", "--timeout is inf; give a finite number"),
        ("--timeout nan", "--timeout is nan"),
        ("--warm-up nan", "--warm-up is nan"),
        ("--cool-down inf", "--cool-down is inf"),
        ("--sample-interval nan", "--sample-interval is nan"),
        ("--quality-share nan", "--quality-share is nan"),
        ("--time-scale nan", "--time-scale is nan"),
        ("--arrivals gamma --burstiness nan", "--burstiness is nan"),
        ("--arrivals gamma --burstiness inf", "--burstiness is inf"),
        ("--arrivals gamma --burstiness 1e-320", "give times that are no numbers"),
        ("--arrivals ramp --ramp-to nan", "--ramp-to is nan"),
        ("--request-rate nan", "--request-rate is nan"),
        ("--request-rate=-inf", "--request-rate is -inf"),
        ("--max-tokens 0", "--max-tokens is 0"),
        ("--shared-prefix-length 99999999999", "--shared-prefix-length is 99999999999"),
        ("--server-pid -4", "--server-pid -4 is no process"),
        ("--server-pid 2147483646", "--server-pid 2147483646 is no process"),
        # What would be ignored in silence.
        ("--time-scale 2", "--time-scale means nothing to --arrivals poisson"),
        ("--trace x.csv", "--trace means nothing without --arrivals or --prompts trace"),
        ("--max-tokens 9", "--max-tokens means nothing without a trace"),
        ("--dataset text:x", "--dataset means nothing to --prompts random"),
        ("--shared-prefix-groups 2", "means nothing without --shared-prefix-length"),
        ("--quality-chunk 32", "means nothing without --quality-share"),
        ("--prompts text --vocab-size 5", "--vocab-size means nothing to --prompts text"),
        ("--tokenizer x", "--vocab-size needs no tokenizer"),
    ],
)
def test_a_load_that_cannot_be(arguments, sentence, tmp_path, capsys):
    with running() as (address, stub):
        assert load(address, tmp_path, *arguments.split()) == (2, None)
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.splitlines()) == 1
    assert stub.count == 0


def test_an_infinite_rate_is_everything_at_once(tmp_path):
    with running() as (address, _):
        status, record = load(address, tmp_path, "--request-rate", "inf")
    assert status == 0
    assert record["requests"]["intended_s"] == [0.0] * 6


def test_lengths_keep_all_their_digits():
    parsed = Lengths.parse(str(Lengths.parse("uniform:1234567:7654321")))
    assert parsed.parameters == (1234567, 7654321)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--warm-up 60", "the last is sent after 0.1 s; lower them"),
        ("--cool-down 60", "leave no request for the steady figures"),
        ("--warm-up 0.08 --cool-down 0.08", "leave no request for the steady figures"),
    ],
)
def test_a_warm_up_beyond_the_run(arguments, sentence, tmp_path, capsys):
    with running() as (address, stub):
        given = ["--arrivals", "constant", *arguments.split()]
        assert load(address, tmp_path, *given) == (2, None)
    assert sentence in capsys.readouterr().err
    assert stub.count == 0


def test_a_warm_up_beyond_a_closed_loop_is_a_warning(tmp_path, capsys):
    with running() as (address, _):
        status, record = load(
            address,
            tmp_path,
            "--arrivals",
            "closed",
            "--max-concurrency",
            "2",
            "--request-rate",
            "inf",
            "--warm-up",
            "60",
        )
    assert status == 0
    assert record["summary"]["steady"]["time_to_first_token_ms"] is None
    assert any("the steady figures are empty" in warning for warning in record["warnings"])
    assert "warning: no request was sent between" in capsys.readouterr().out


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n%s,3,2\n%s,4,2\n"


@pytest.mark.parametrize(
    ("first", "second", "gap"),
    [
        ("2023-11-16 18:15:46.6805900", "2023-11-16 18:15:47.1805900", 0.5),
        ("2023-11-16 18:15:46.6805900Z", "2023-11-16T18:15:47.1805900Z", 0.5),
        ("2023-11-16 18:15:46+00:00", "2023-11-16 18:15:47.5+00:00", 1.5),
        # The same second in two zones; and across the end of summer time.
        ("2023-11-16 20:15:46+02:00", "2023-11-16 18:15:47Z", 1.0),
        ("2023-10-29 02:59:59+02:00", "2023-10-29 02:00:00+01:00", 1.0),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_time_stamps_of_a_trace(first, second, gap, mark, tmp_path):
    path = tmp_path / "a.CSV"
    path.write_text(mark + AZURE % (first, second), encoding="utf-8")
    entries = read_trace(path)
    assert [entry.input_length for entry in entries] == [3, 4]
    assert entries[1].seconds == pytest.approx(gap)


def mooncake(*hash_ids, **changes):
    row = {"timestamp": 0, "input_length": 600, "output_length": 3, "hash_ids": hash_ids, **changes}
    return json.dumps(row) + "\n"


def test_blocks_of_a_trace_may_have_any_name(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(
        "\ufeff"
        + mooncake("a1", "b")
        + mooncake("a1", "c")
        + mooncake(-7, -8.0)
        + mooncake(-7, 8)
        + mooncake(7, 8)
        + mooncake(None, hash_ids=None, input_length="600")
    )
    specification = LoadSpecification.parse(
        {"num_requests": 6, "arrivals": "trace", "prompts": "trace", "trace": str(path)}
    )
    prompts = [request.prompt for request in make_plan(specification, 1000, None).requests]
    assert {len(prompt) for prompt in prompts} == {600}
    heads, tails = [prompt[:512] for prompt in prompts], [prompt[512:] for prompt in prompts]
    assert heads[0] == heads[1]
    assert heads[2] == heads[3] != heads[4]
    assert len({tuple(head) for head in heads}) == 4
    assert tails[3] == tails[4]
    assert tails[0] != tails[1]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("x.jsonl", mooncake() + mooncake(timestamp=float("nan")), "entry 2 .*timestamp is nan"),
        ("x.jsonl", mooncake(timestamp=float("inf")), "entry 1 .*not a finite number"),
        ("x.jsonl", mooncake(input_length=float("inf")), "entry 1 .*input_length is inf"),
        ("x.jsonl", mooncake(output_length=2.5), "output_length is 2.5, not a whole number"),
        ("x.jsonl", mooncake(output_length=True), "output_length is True"),
        ("x.jsonl", mooncake(output_length=1e12), "output_length is 1000000000000.0, out of range"),
        ("x.jsonl", mooncake(1.5), "hash_ids holds 1.5"),
        ("x.jsonl", mooncake([1]), r"hash_ids holds \[1\]"),
        ("x.jsonl", mooncake(hash_ids="abc"), "hash_ids is 'abc', not a list"),
        ("x.jsonl", "[1]\n", "entry 1 .*it is no mapping"),
        ("x.csv", AZURE % ("2023-11-16 18:15", "soon"), "entry 2 .*soon"),
        ("x.csv", AZURE % ("2023-11-16 18:15", "2023-11-16 18:15Z"), "entry 2 .*time zone"),
        ("x.csv", AZURE % ("2023-11-16 18:15", "2023\0"), "entry 2"),
        ("x.csv", "TIMESTAMP,ContextTokens\n2023-11-16,3\n", "entry 1 .*no GeneratedTokens"),
    ],
)
def test_an_entry_of_a_trace_that_cannot_be_read_is_named(name, content, sentence, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=sentence):
        read_trace(tmp_path / name)


STUDY = {
    "methods": ["h2o"],
    "rates": [2],
    "vocabulary_size": 10,
    "load": {"num_requests": 3},
}


def of_load(**values):
    return {"load": {"num_requests": 3, **values}}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (of_load(settings={"kv_polcy": "h2o"}), "did you mean 'kv_policy'"),
        (of_load(settings={"kv_frobnicate": 1}), "unknown request setting 'kv_frobnicate'"),
        (of_load(settings={"other": float("nan")}), "settings of a load cannot be put into"),
        (of_load(settings={"kv_policy_args": {"local": 1}}), "as JSON text only"),
        (of_load(settings={"kv_sparsity": float("nan")}), "would make every run another"),
        (of_load(settings={"kv_policy": "cab"}), "set methods and sparsity instead"),
        (of_load(slo={"speed": 4}), "--slo 'speed:4'"),
        (of_load(slo={"time_to_first_token_ms": float("nan")}), "time_to_first_token_ms:nan"),
        (of_load(timeout_s=float("inf")), "--timeout is inf"),
        (of_load(dataset=5), "dataset is 5; give a text"),
        (of_load(input_length=None), "input_length of load is empty; give a value"),
        ({"slo": {"time_to_first_token_ms": {"p99": float("nan")}}}, "has p99: nan"),
        ({"slo": {"time_to_first_token_ms": {"p99": True}}}, "has p99: True"),
        ({"rates": ["fast"]}, "rates has 'fast'; give finite numbers"),
        ({"rates": [float("inf")]}, "rates has inf; give finite numbers"),
        ({"rates": [-1]}, "rates has -1"),
        ({"seeds": [1.5]}, "seeds has 1.5; give whole numbers"),
        ({"block_size": 0}, "block_size is 0; give a whole number of at least 1"),
        ({"block_size": "big"}, "block_size is 'big'; give a whole number"),
        ({"vocabulary_size": -5}, "vocabulary_size is -5"),
        ({"warm_up_requests": -1}, "warm_up_requests is -1"),
        ({"startup_timeout_s": float("nan")}, "startup_timeout_s is nan; give a finite number"),
        ({"startup_timeout_s": 0}, "startup_timeout_s is 0"),
        ({"model": None}, "model of a serving study is empty; give a value or remove the line"),
        ({"eviction": {"policy_args": None}}, "policy_args of eviction is empty; give a value"),
        ({"eviction": {"policy_args": "cab"}}, "policy_args is 'cab'; give a mapping"),
        ({"server": {"x": float("inf")}}, "server cannot be put into a record"),
        ({"server": {None: 1}}, "server has None where a name belongs; give a text"),
        ({"server": {"since": datetime(2024, 1, 1)}}, "server cannot be put into a record"),
        (
            {"eviction": {"policy_args": {"cab": {"local": float("nan")}}}},
            "local of policy cab is nan",
        ),
        ({"server": {"api_key": "x"}}, "export VLLM_API_KEY instead"),
        ({"environment": {"VLLM_API_KEY": "x"}}, "export VLLM_API_KEY instead"),
    ],
)
def test_a_study_that_cannot_be(changes, sentence, tmp_path, capsys):
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}))
    assert main(["serve-sweep", str(path), "--output-dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_arguments_of_a_policy_that_only_the_server_knows_are_its_own_to_check():
    settings = {"kv_policy_args": '{"local": 0.5}'}
    study = ServingStudy.parse({**STUDY, **of_load(settings=settings)})
    assert study.runs()[0].measurement.load.settings == settings


@pytest.mark.parametrize(
    ("script", "arguments", "sentence"),
    [
        (bench_client, "--rates inf", "needs a finite --request-rate above 0, not inf"),
        (bench_client, "--seconds nan", "--duration is nan"),
        (compare_clients, "--base-url http://127.0.0.1:1 --runs 0", "--runs must be at least 1"),
        (compare_clients, "--base-url http://127.0.0.1:1", "no OpenAI server answers"),
    ],
)
def test_scripts_refuse_with_a_sentence_too(
    script, arguments, sentence, tmp_path, monkeypatch, capsys
):
    given = ["x", "--output", str(tmp_path / "r.json"), *arguments.split()]
    monkeypatch.setattr("sys.argv", given)
    assert script.main() == 2
    assert sentence in capsys.readouterr().err
