"""A batch on an engine: its prompts, turn after turn, from empty to done.

    turn 1: [ shared | own ]                    -> answer
    turn 2: [ shared | own | answer | new ]     -> answer

Prompts are random tokens. A conversation's next prompt is all that was said so far, and new tokens.
A search has one turn, and all its beams are answers. No vLLM is imported here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ..study.batch_specification import Batch


class Llm(Protocol):
    """What is used of ``vllm.LLM``."""

    def reset_prefix_cache(self) -> bool: ...
    def generate(self, prompts: Any, params: Any, *, use_tqdm: bool) -> Any: ...
    def beam_search(self, prompts: Any, params: Any) -> Any: ...


@dataclass
class Turns:
    """What was asked and answered.

    Attributes:
        seconds: of each turn, wall time.
        answers: tokens of each request, one turn's requests after the other's.
        records: what was evicted, by request; {} without the plugin. A search has none.
        prompt_tokens: of all requests. Of a search only its caller can know, by counters.
        cached_tokens: of them, taken from the prefix cache. Likewise.

    """

    seconds: list[float] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0


def run_turns(
    llm: Llm, params: Any, batch: Batch, seed: int, vocabulary: int, prefix_caching: bool
) -> Turns:
    """Ask every turn of a batch. Where prefixes are cached, the cache is emptied first.

    Args:
        llm: an idle engine.
        params: sampling parameters of every request, or those of a search.
        batch: what is asked.
        seed: random tokens follow from it.
        vocabulary: number of tokens there are.
        prefix_caching: whether ``llm`` caches prefixes.

    """
    random = np.random.default_rng(seed)
    prompts = first_prompts(batch, random, vocabulary)
    if prefix_caching:
        emptied = llm.reset_prefix_cache()
        assert emptied, "some request holds blocks of the prefix cache between two batches"
    turns = Turns()
    if batch.beam_width > 1:
        _search(llm, params, prompts, turns)
        return turns
    for turn in range(batch.turns):
        if turn:
            new = random.integers(0, vocabulary, size=(len(prompts), batch.turn_tokens)).tolist()
            said = turns.answers[-len(prompts) :]
            prompts = [[*p, *a, *n] for p, a, n in zip(prompts, said, new, strict=True)]
        _ask(llm, params, prompts, turns)
    return turns


def first_prompts(batch: Batch, random: np.random.Generator, vocabulary: int) -> list[list[int]]:
    """``(num_requests, prompt_tokens)`` random tokens, the first ``shared_tokens`` alike."""
    tokens = random.integers(0, vocabulary, size=(batch.num_requests, batch.prompt_tokens))
    tokens[:, : batch.shared_tokens] = tokens[0, : batch.shared_tokens]
    return tokens.tolist()


def _ask(llm: Llm, params: Any, prompts: list[list[int]], turns: Turns) -> None:
    """One turn of all conversations; what comes of it is added to ``turns``."""
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    started = time.perf_counter()
    outputs = llm.generate(asked, params, use_tqdm=False)
    turns.seconds.append(time.perf_counter() - started)
    turns.answers += [list(output.outputs[0].token_ids) for output in outputs]
    turns.records += [(o.kv_transfer_params or {}).get("kv_eviction", {}) for o in outputs]
    turns.prompt_tokens += sum(map(len, prompts))
    turns.cached_tokens += sum(output.num_cached_tokens or 0 for output in outputs)


def _search(llm: Llm, params: Any, prompts: list[list[int]], turns: Turns) -> None:
    """Beams of every prompt, each an answer; what comes of it is added to ``turns``."""
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    started = time.perf_counter()
    outputs = llm.beam_search(asked, params)
    turns.seconds.append(time.perf_counter() - started)
    for prompt, output in zip(prompts, outputs, strict=True):
        turns.answers += [beam.tokens[len(prompt) :] for beam in output.sequences]
