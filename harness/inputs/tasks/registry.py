"""Tasks by name, and the samples that a seed draws of each."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UsageError
from .code import code_completion
from .haystack import Haystack
from .jsonl import read_lines
from .needles import needles
from .sample import ALL, Draft, Sample, encode, fit
from .turns import multi_turn
from .variables import variable_tracking
from .words import common_words, frequent_words

LONG_GENERATION = "long_generation"


@dataclass(frozen=True)
class Task:
    """A task whose samples are generated."""

    draft: Callable[[Haystack, np.random.Generator, int], Draft]
    """From the text, a generator and a prompt's most tokens."""
    max_tokens: int
    """Of an answer; RULER's, or fewer where that is enough for numbers digit by digit."""


GENERATED = {
    "niah_single": Task(needles(), 32),
    "niah_multikey": Task(needles(keys=4), 32),
    "niah_multivalue": Task(needles(values=4), 96),
    "niah_multiquery": Task(needles(keys=4, queries=4), 96),
    "variable_tracking": Task(variable_tracking, 48),
    "common_words": Task(common_words, 96),
    "frequent_words": Task(frequent_words, 48),
    "code_completion": Task(code_completion, 16),
    "multi_turn": Task(multi_turn, 24),
}
TASKS = (*GENERATED, LONG_GENERATION)
"""Names of all tasks but those of files."""


@dataclass(frozen=True)
class Asked:
    """What a study asks of a task."""

    num_samples: int
    context_length: int
    """Tokens of a request: prompt and answer."""
    question: str
    """Of ``sample.QUESTIONS``."""
    output_tokens: int
    """Of an answer, where the task does not say."""


def draw_samples(
    name: str, tokenizer: Any, haystack: Haystack, asked: Asked, seed: int
) -> list[Sample]:
    """Samples of a generated task: the same for the same arguments on every machine.

    Raises:
        UsageError: text or context are too short for the task.

    """
    return [
        _sample(name, tokenizer, haystack, asked, [seed, zlib.crc32(name.encode()), place])
        for place in range(asked.num_samples)
    ]


def _sample(
    name: str, tokenizer: Any, haystack: Haystack, asked: Asked, seeds: list[int]
) -> Sample:
    rng = np.random.default_rng(seeds)
    if name == LONG_GENERATION:
        window = haystack.tokens(rng, asked.context_length - asked.output_tokens)
        return Sample(array("i", window), (), None, asked.output_tokens)
    task = GENERATED[name]
    limit = asked.context_length - task.max_tokens
    if limit < 1:
        raise UsageError(
            f"--context-length {asked.context_length} leaves no prompt beside the "
            f"{task.max_tokens} tokens of an answer of task {name}; raise it"
        )
    draft = task.draft(haystack, rng, limit)
    prompt = fit(draft, tokenizer, limit, asked.question, name, asked.context_length)
    return Sample(prompt, draft.expected, ALL, task.max_tokens)


def read_samples(path: Path, tokenizer: Any, asked: Asked, seed: int) -> list[Sample]:
    """Samples of a file: all of its lines, or as many as asked for, drawn by the seed.

    Raises:
        UsageError: the file or a line of it is wrong, or a prompt is too long. Nothing is cut.

    """
    lines = read_lines(path)
    if len(lines) > asked.num_samples:
        drawn = np.random.default_rng(seed).choice(len(lines), asked.num_samples, replace=False)
        lines = [lines[i] for i in sorted(drawn.tolist())]
    samples = []
    for line in lines:
        prompt = encode(tokenizer, line.prompt)
        max_tokens = line.max_tokens or asked.output_tokens
        if len(prompt) + max_tokens > asked.context_length:
            raise UsageError(
                f"{path}, line {line.number}: a prompt of {len(prompt)} tokens and an answer of "
                f"{max_tokens} do not fit into --context-length {asked.context_length}; raise it, "
                "or leave the line out"
            )
        samples.append(Sample(prompt, line.answers, line.metric, max_tokens))
    return samples
