"""Answers that end without being what was asked for, or without saying what they are."""

import json

import pytest

from harness.client.load_plan import QUALITY, make_plan
from harness.client.load_settings import LoadSpecification
from harness.client.result import SUCCEEDED, Result
from harness.client.sampling import Sampler
from harness.client.target import Target
from harness.measure.load import run_load
from harness.measure.load_record import load_record

from .serving_stub import load, running


@pytest.mark.parametrize(
    ("mode", "kind", "error", "message"),
    [
        ("abort", "incomplete", "finish_abort", "finish_reason is 'abort' after 5 of 5 tokens"),
        ("error_finish", "incomplete", "finish_error", "'error' after 2 of 5 tokens"),
        ("eos", "incomplete", "too_few_tokens", "the server does not follow ignore_eos"),
        ("short", "incomplete", "too_few_tokens", "max_model_len, is lower"),
        ("too_many", "failed", "too_many_tokens", "made 9 tokens where 5 were asked for"),
        ("odd_usage", "failed", "malformed_stream", "not a completion chunk"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for(mode, kind, error, message, tmp_path):
    with running(mode, after=2) as (address, _):
        status, record = load(address, tmp_path)
    assert status == 1
    assert record["counts"]["succeeded"] == 2
    assert record["counts"][kind] == 4
    (row,) = record["failures"]
    assert (row["status"], row["error"], row["count"]) == (kind, error, 4)
    assert message in row["message"]
    assert record["summary"]["all"]["time_to_first_token_ms"]["count"] == 2


@pytest.mark.parametrize("mode", ["stop_at_the_end", "two_a_chunk"])
def test_all_tokens_that_were_asked_for_are_a_success_however_they_came(mode, tmp_path):
    with running(mode) as (address, _):
        status, record = load(address, tmp_path)
    assert status == 0
    assert record["requests"]["output_tokens"] == [5] * 6
    assert sum(record["output_tokens"]["tokens"]) == pytest.approx(30, abs=0.1)


def test_without_usage_tokens_are_unknown_not_chunks(tmp_path, capsys):
    with running("no_usage") as (address, _):
        status, record = load(address, tmp_path, "--slo", "time_per_output_token_ms:1000")
    assert status == 0, "how many there are cannot be judged"
    assert record["requests"]["output_tokens"] == [None] * 6
    assert record["requests"]["chunks"] == [3] * 6
    assert record["output_tokens"]["tokens"] is None
    summary = record["summary"]["all"]
    assert summary["output_throughput"] is None
    assert summary["time_per_output_token_ms"] is None
    assert summary["goodput"] is None, "an objective on an unknown latency is not kept"
    assert summary["request_throughput"] > 0
    assert summary["time_to_first_token_ms"]["count"] == 6
    (warning,) = [w for w in record["warnings"] if "usage" in w]
    assert "the server sent no usage with 6 answers" in warning
    lines = capsys.readouterr().out.splitlines()
    unknown = [line.split()[0] for line in lines if "unknown: the server sent no usage" in line]
    assert unknown == ["time_per_output_token_ms", "output_throughput", "goodput"]


def test_chunks_that_stand_in_for_tokens_of_a_broken_answer_are_told(tmp_path):
    with running("close", after=4) as (address, _):
        _, record = load(address, tmp_path)
    assert any("2 answers broke off before" in w for w in record["warnings"])
    assert record["summary"]["all"]["output_throughput"] > 0


QUALITY_LOAD = {
    "num_requests": 4,
    "input_length": 4,
    "output_length": 2,
    "request_rate": 100,
    "quality": {"share": 0.5, "context_length": 8, "num_windows": 2, "chunk": 4},
}


def quality_of(answers):
    """The quality record of a load whose two windows were answered so."""
    specification = LoadSpecification.parse(QUALITY_LOAD)
    plan = make_plan(specification, 100, lambda dataset: list(range(100)))
    results = []
    for request in plan.requests:
        result = Result(
            request.index, request.kind, 0.0, SUCCEEDED, 0.0, 1.0, window=request.window
        )
        if request.kind == QUALITY:
            result.answer = answers.pop(0)(request.prompt)
        else:
            result.chunks = [0.5, 1.0]
        results.append(result)
    target = Target("http://stub", "stub", "stub", None, None)
    sampler = Sampler("http://stub", 1.0)
    record = load_record(specification, plan, target, results, sampler, 0.0, None)
    json.dumps(record, allow_nan=False)
    return record["quality"]


def answer(*log_probs, **rest):
    """An answer whose log-probs are these, and -1 for the tokens after them."""
    values = [*log_probs, *[-1.0] * 7][:7]

    def make(prompt):
        entries = [{str(t): {"logprob": v}} for t, v in zip(prompt[1:], values, strict=True)]
        return {"choices": [{"prompt_logprobs": [None, *entries]}], **rest}

    return make


def eviction(**record):
    return {"kv_transfer_params": {"kv_eviction": record}}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (answer(-1.0, float("nan")), "nan is no log-prob of a token (token 2 of the window)"),
        (answer(float("-inf")), "-inf is no log-prob"),
        (answer(0.7), "0.7 is no log-prob"),
        (answer(-1e300, -1e300), "-1e+300 is no log-prob"),
        (answer(**eviction(first_eviction_tokens=float("nan"))), "the plugin's counts"),
        (answer(**eviction(blocks_evicted=2, first_eviction_tokens=4)), "the plugin's counts"),
        (answer(kv_transfer_params={"kv_eviction": [1]}), "the plugin's counts"),
    ],
)
def test_a_window_without_usable_numbers_is_told_and_in_no_perplexity(bad, reason):
    quality = quality_of([answer(-2.0), bad])
    assert (quality["num_answered"], quality["num_unusable"], len(quality["windows"])) == (2, 1, 1)
    assert reason in quality["unusable"][0]["reason"]
    assert quality["perplexity"] == pytest.approx(2.718281828 ** (8 / 7), rel=1e-6)


def test_a_perplexity_that_no_number_holds_is_none():
    quality = quality_of([answer(*[-9999.0] * 7), answer(*[-9999.0] * 7)])
    assert (quality["perplexity"], quality["num_unusable"]) == (None, 0)


def test_a_quality_answer_that_was_cut_off_is_incomplete(tmp_path):
    body = {"choices": [{"finish_reason": "abort"}], "usage": {"completion_tokens": 0}}
    specification = LoadSpecification.parse(
        {**QUALITY_LOAD, "quality": {"share": 0.9, "context_length": 8, "num_windows": 2}}
    )
    plan = make_plan(specification, 100, lambda dataset: list(range(100)))
    with running(pages={"/v1/completions": json.dumps(body)}) as (address, _):
        target = Target(address, "stub", "stub", None, None)
        record = run_load(specification, plan, target, progress=False).record
    assert record["counts"]["incomplete"] == 4
    assert "finish_abort" in {row["error"] for row in record["failures"]}
