"""A batch turn by turn on an engine that is none: its tokens, its order, what it counts."""

from types import SimpleNamespace

import numpy as np
import pytest

from harness.resources.batch_turns import first_prompts, run_turns
from harness.resources.batch_worker import engine_arguments
from harness.study.batch_specification import Batch

VOCABULARY = 1000
BATCH = Batch(num_requests=3, prompt_tokens=20, output_tokens=4)
CHAT = Batch(num_requests=2, prompt_tokens=20, output_tokens=4, turns=3, turn_tokens=5)


class Llm:
    """Answers with tokens above the vocabulary, so that prompts show whose they are."""

    def __init__(self, idle=True):
        self.calls = []
        self._idle = idle

    def reset_prefix_cache(self):
        self.calls.append("reset")
        return self._idle

    def generate(self, prompts, params, *, use_tqdm):
        asked = [prompt["prompt_token_ids"] for prompt in prompts]
        self.calls.append(asked)
        turn = sum(call != "reset" for call in self.calls)
        return [self._output(10_000 * turn + 100 * place) for place in range(len(asked))]

    def beam_search(self, prompts, params):
        self.calls.append([prompt["prompt_token_ids"] for prompt in prompts])
        beams = [
            [SimpleNamespace(tokens=[*prompt, 7, beam]) for beam in range(params)]
            for prompt in self.calls[-1]
        ]
        return [SimpleNamespace(sequences=sequences) for sequences in beams]

    def _output(self, token):
        answer = SimpleNamespace(token_ids=[token, token + 1, token + 2, token + 3])
        record = {"kv_eviction": {"peak_blocks": token}}
        return SimpleNamespace(outputs=[answer], kv_transfer_params=record, num_cached_tokens=7)


def ask(batch, seed=0, prefix_caching=True):
    llm = Llm()
    return llm.calls, run_turns(llm, None, batch, seed, VOCABULARY, prefix_caching)


def prompts_of(batch, seed):
    return np.array(first_prompts(batch, np.random.default_rng(seed), VOCABULARY))


@pytest.mark.parametrize("shared", [0, 1, 12, 20])
def test_the_first_tokens_are_shared_and_no_others(shared):
    batch = Batch(3, 20, 4, shared_tokens=shared)
    tokens = prompts_of(batch, 0)
    assert (tokens[:, :shared] == tokens[0, :shared]).all()
    alone = prompts_of(BATCH, 0)
    assert (tokens[:, shared:] == alone[:, shared:]).all(), "the rest is as without sharing"
    assert len({tuple(row) for row in tokens.tolist()}) == (1 if shared == 20 else 3)


def test_seeds_have_tokens_of_their_own():
    alike = Batch(2, 20, 4, shared_tokens=20)
    assert (prompts_of(alike, 3) == prompts_of(alike, 3)).all()
    assert (prompts_of(alike, 3) != prompts_of(alike, 4)).any()
    assert (prompts_of(alike, 3) != prompts_of(alike, 2**63 + 3)).any(), "a warm-up's"


def test_a_turn_asks_all_that_was_said_and_new_tokens():
    (_, first, second, third), made = ask(CHAT)
    for place in range(2):
        answer = [10_000 + 100 * place + n for n in range(4)]
        assert second[place][:24] == [*first[place], *answer]
        assert len(second[place]) == 29
        assert third[place][:29] == second[place]
        assert third[place][29:33] == [20_000 + 100 * place + n for n in range(4)]
        assert len(third[place]) + CHAT.output_tokens == CHAT.max_tokens
    assert second[0][24:] != second[1][24:], "each is told something else"
    assert second[0][24:] != third[0][33:]
    assert len(made.seconds) == 3
    assert [len(answer) for answer in made.answers] == [4] * 6
    assert [r["peak_blocks"] for r in made.records] == [
        t + p for t in (1e4, 2e4, 3e4) for p in (0, 100)
    ]
    assert (made.prompt_tokens, made.cached_tokens) == (2 * (20 + 29 + 38), 6 * 7)


def test_the_cache_is_emptied_before_the_first_turn_and_never_after():
    calls, _ = ask(CHAT)
    assert [call == "reset" for call in calls] == [True, False, False, False]
    calls, _ = ask(CHAT, prefix_caching=False)
    assert "reset" not in calls
    with pytest.raises(AssertionError, match="holds blocks of the prefix cache"):
        run_turns(Llm(idle=False), None, BATCH, 0, VOCABULARY, True)


def test_all_beams_of_a_search_are_answers():
    llm = Llm()
    batch = Batch(num_requests=2, prompt_tokens=20, output_tokens=2, beam_width=3)
    made = run_turns(llm, 3, batch, 0, VOCABULARY, True)
    assert llm.calls == ["reset", first_prompts(batch, np.random.default_rng(0), VOCABULARY)]
    assert made.answers == [[7, 0], [7, 1], [7, 2]] * 2
    assert len(made.seconds) == 1
    assert made.records == []


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("eviction", [None, {"policy": "dense"}])
def test_both_sides_are_told_whether_prefixes_are_cached(eviction, prefix_caching):
    made = engine_arguments({"seed": 0}, 32, eviction, prefix_caching)
    assert made["enable_prefix_caching"] is prefix_caching
    assert (made["seed"], made["block_size"]) == (0, 32)
