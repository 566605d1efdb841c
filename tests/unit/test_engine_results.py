"""What the harness makes of an engine's outputs: log-probs in place, and refusals of what is not
what the specification says. No engine runs."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from harness.resources.engine import Engine
from harness.resources.scored import UnfaithfulRun
from harness.resources.waves import waves
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


def output(prompt, prompt_logprobs=None, token_ids=(), logprobs=None, record=RECORD, cached=0):
    return SimpleNamespace(
        num_cached_tokens=cached,
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


@pytest.mark.parametrize(
    ("steps", "size", "wanted"),
    [
        ([3, 3, 3, 3], 2, [([0, 1], False), ([2, 3], False)]),
        ([3, 3, 3], 2, [([0, 1], False), ([2], True)]),
        ([1, 5, 2, 5], 4, [([1, 3, 2, 0], False)]),
        ([1, 5, 2, 4], 4, [([1, 3, 2], True), ([0], False)]),
        ([4], 8, [([0], True)]),
        ([1], 8, [([0], False)]),
    ],
)
def test_two_requests_of_a_wave_have_its_longest_prompt(steps, size, wanted):
    made = waves(steps, size)
    assert made == wanted
    for places, companion in made:
        assert len(places) + companion <= size


def answering(requests, num_steps, cached=None):
    """An engine that answers each prompt with its first token, up to the tokens asked for. Of each
    it finds so many tokens ``cached``; None: it has no prefix cache."""
    made = engine()
    made.specification = replace(
        SPECIFICATION, kv_pool_windows=2, prefix_caching=cached is not None
    )
    made.waves, made.settings = [], []

    def run(batch, progress, pool=None, num_counted=None):
        made.waves.append(([len(prompt) for prompt, _ in batch], num_counted))
        made.settings.append([params.extra_args for _, params in batch])
        outputs = []
        for prompt, params in batch:
            made_up = output(
                prompt,
                token_ids=prompt[:1] * min(params.max_tokens, prompt[0]),
                record={"num_steps": num_steps(len(prompt), params.max_tokens), "preemptions": 0},
                cached=cached or 0,
            )
            made_up.outputs[0].text = str(prompt[0])
            made_up.outputs[0].finish_reason = "stop" if prompt[0] < 3 else "length"
            outputs.append(made_up)
        return outputs

    made._run = run
    return made


SCORED = {"kv_policy": "h2o", "kv_sparsity": 0.5}
REQUESTS = [([1] * 5, 3), ([2] * 9, 2), ([3] * 5, 3)]


def test_answers_come_in_the_order_of_their_requests():
    made = answering(REQUESTS, lambda prompt, _: -(-prompt // 4) + {5: 2, 9: 1}[prompt])
    made._check_steps = lambda record, steps, told: None
    _, answers = made.answer(REQUESTS, {})
    assert [answer.text for answer in answers] == ["1", "2", "3"]
    assert [answer.token_ids for answer in answers] == [[1], [2, 2], [3, 3, 3]]
    assert [answer.ended for answer in answers] == [True, True, False]
    # The longest prompt has a companion, which nobody counts.
    assert made.waves == [([9, 9], 1), ([5, 5], 2)]


def test_an_answer_in_other_steps_than_its_chunks_make_is_refused():
    requests = [([3] * 5, 3), ([3] * 5, 3)]
    answering(requests, lambda prompt, made: 2 + 2).answer(requests, {})
    with pytest.raises(
        UnfaithfulRun, match="a prompt of 5 tokens answered with 3 took 3 steps, not the 4"
    ):
        answering(requests, lambda prompt, made: 1 + 2).answer(requests, {})


def test_a_dense_request_computes_a_prompt_before_it_is_answered_from_the_cache():
    requests = [([3] * 50, 3), ([4] * 50, 3)]
    made = answering(requests, lambda prompt, _: 9 + 2, cached=16)  # 34 tokens in chunks of 4
    _, answers = made.answer(requests, SCORED)
    assert made.waves == [([50, 50], 0), ([50, 50], 2)]
    assert made.settings == [[{"kv_policy": "dense"}] * 2, [SCORED] * 2]
    assert [answer.cached_tokens for answer in answers] == [16, 16]


@pytest.mark.parametrize(
    ("settings", "cached", "whole"), [(SCORED, 12, 16), ({"kv_policy": "dense"}, 16, 48)]
)
def test_a_prompt_that_the_cache_lost_is_refused(settings, cached, whole):
    """Who scores nothing finds all but its last token, or something is wrong."""
    requests = [([3] * 50, 3), ([4] * 50, 3)]
    made = answering(requests, lambda prompt, _: -(-(50 - cached) // 4) + 2, cached=cached)
    told = f"the prefix cache had {cached} tokens of a prompt of 50, not the {whole} that"
    with pytest.raises(UnfaithfulRun, match=told):
        made.answer(requests, settings)


def test_a_trace_is_coarse():
    pool = [(n * 4, n * 8) for n in range(1, 1001)]
    trace = engine()._trace(pool, num_windows=8)
    assert len(trace["tokens"]) == len(trace["blocks"]) <= 64
    assert trace["tokens"][-1] == 4 * trace["blocks"][-1]
