"""What the harness makes of an engine's outputs: log-probs in place, and refusals of what is not
what the specification says. No engine runs."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from harness.resources.engine import Engine
from harness.resources.scored import UnfaithfulRun
from harness.study.specification import EngineSpecification

SPECIFICATION = EngineSpecification(
    "m", "f", 100, 4, 4, 8, 8, True, eviction={"layer_groups": 1}, protocol="chunked"
)
WINDOW = [10, 11, 12, 13, 14, 15]
RECORD = {"num_steps": 2, "preemptions": 0}


def engine(protocol="chunked"):
    made = object.__new__(Engine)
    made.specification = replace(SPECIFICATION, protocol=protocol)
    return made


def flat(*positions):
    """As vLLM's ``FlatLogprobs``: the position's own token first, then others."""
    starts, values = [], []
    for entries in positions:
        starts.append(len(values))
        values += entries
    return SimpleNamespace(start_indices=starts, logprobs=values)


def output(prompt, prompt_logprobs=None, token_ids=(), logprobs=None, record=RECORD):
    return SimpleNamespace(
        prompt_token_ids=prompt,
        prompt_logprobs=prompt_logprobs,
        outputs=[SimpleNamespace(token_ids=list(token_ids), logprobs=logprobs)],
        kv_transfer_params={"kv_eviction": record},
    )


def test_prompt_log_probs_are_the_tokens_own():
    entries = flat([], [-1.0], [-2.0, -0.1], [-3.0], [-4.0], [-5.0])
    scored = engine()._scored(WINDOW, output(WINDOW, entries))
    assert scored.log_likelihoods == [-1.0, -2.0, -3.0, -4.0, -5.0]
    assert scored.record == RECORD


def test_forced_decode_leaves_the_prompt_unscored():
    entries = flat([-2.0], [-3.0, -0.5], [-4.0], [-5.0])
    scored = engine("decode")._scored(WINDOW, output(WINDOW[:2], None, WINDOW[2:], entries))
    assert scored.log_likelihoods == [0.0, -2.0, -3.0, -4.0, -5.0]


def test_a_decode_that_went_astray_is_refused():
    entries = flat([-2.0], [-3.0], [-4.0], [-5.0])
    with pytest.raises(UnfaithfulRun, match="other tokens than the window's"):
        engine("decode")._scored(WINDOW, output(WINDOW[:2], None, [12, 13, 99, 15], entries))


def test_missing_log_probs_are_refused():
    with pytest.raises(UnfaithfulRun, match="gave 4 log-probs for a window of 6 tokens"):
        engine()._scored(WINDOW, output(WINDOW, flat([], [-1.0], [-2.0], [-3.0], [-4.0])))


@pytest.mark.parametrize(
    ("protocol", "min_context", "steps"), [("chunked", 1, 2), ("decode", 1, 5), ("decode", 5, 2)]
)
def test_the_number_of_steps_is_what_the_protocol_makes(protocol, min_context, steps):
    made = engine(protocol)
    made._verify(WINDOW, {**RECORD, "num_steps": steps}, min_context)
    with pytest.raises(UnfaithfulRun, match=rf"took {steps + 1} steps, not the {steps}"):
        made._verify(WINDOW, {**RECORD, "num_steps": steps + 1}, min_context)


@pytest.mark.parametrize("failure", ["policy_error", "refused_settings"])
def test_a_policy_that_failed_makes_no_result(failure):
    with pytest.raises(UnfaithfulRun, match=f"{failure}: why"):
        engine()._verify(WINDOW, {**RECORD, failure: "why"}, 1)


def test_a_trace_is_coarse():
    pool = [(n * 4, n * 8) for n in range(1, 1001)]
    trace = engine()._trace(pool, num_windows=8)
    assert len(trace["tokens"]) == len(trace["blocks"]) <= 64
    assert trace["tokens"][-1] == 4 * trace["blocks"][-1]
