"""What a task asks: its parts before they are a prompt, and the prompt that an engine gets."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...errors import UsageError

AFTER, BEFORE = "after", "before"
QUESTIONS = (AFTER, BEFORE)
"""Where the question stands: at the end alone, or before the text too. Between the chunks of a
prompt blocks are evicted; a question at the end alone is hidden from those decisions."""
COMPUTED, CACHED = "computed", "cached"
PREFIXES = (COMPUTED, CACHED)
"""How a prompt comes about: all of it is computed, or all but its end is found in the prefix cache,
where a dense request left it."""
ALL, CONTAINS, EXACT, F1 = "all", "contains", "exact", "f1"
"""Metrics of an answer: see ``analysis.task_scores``."""
FILLED = 0.98
"""A prompt takes at least this share of the tokens that it may have, where its filler allows."""
_MAX_FITS = 32


@dataclass(frozen=True)
class Sample:
    """One prompt and what its answer should say."""

    prompt: array[int]
    """Token ids, special tokens included, ``[n]``. Four bytes each: a study holds hundreds of
    long prompts."""
    expected: tuple[str, ...]
    """Empty where nothing is right or wrong."""
    metric: str | None
    max_tokens: int
    """Of the answer."""


@dataclass(frozen=True)
class Draft:
    """A sample whose filler is still to be cut to length."""

    intro: str
    context: Callable[[int], str]
    """The text with so many units of filler; the same for the same number."""
    question: str
    answer_prefix: str
    """The beginning of the answer, for the model to go on."""
    expected: tuple[str, ...]
    announced: str = ""
    """The question as it stands before the text; empty: ``question``."""
    tokens_per_unit: float = 1.0
    """Of filler, about."""

    def text(self, units: int, question: str) -> str:
        """The whole prompt with ``units`` of filler."""
        before = f"{self.announced or self.question}\n\n" if question == BEFORE else ""
        return f"{before}{self.intro}{self.context(units)}{self.question}{self.answer_prefix}"


def encode(tokenizer: Any, text: str) -> array[int]:
    """Token ids as a server would make them of a completion's prompt: special tokens included."""
    return array("i", tokenizer(text).input_ids)


def fit(
    draft: Draft, tokenizer: Any, limit: int, question: str, name: str, context_length: int
) -> array[int]:
    """The draft's prompt with as much filler as ``limit`` tokens take, at least ``FILLED`` of
    them where the filler is that fine.

    Raises:
        UsageError: the task's own words are longer than that.

    """
    low, high, best = 0, limit + 1, encode(tokenizer, draft.text(0, question))
    if (base := len(best)) > limit:
        raise UsageError(
            f"task {name} takes {base} tokens without any filler, and {limit} fit into "
            f"--context-length {context_length} beside its answer; raise it"
        )
    aim, rate = (1 + FILLED) / 2 * limit, draft.tokens_per_unit
    for _ in range(_MAX_FITS):
        units = min(max(low + 1, low + int((aim - len(best)) / rate)), high - 1)
        if units <= low or len(best) >= FILLED * limit:
            break
        prompt = encode(tokenizer, draft.text(units, question))
        rate = max(0.1, (len(prompt) - base) / units)
        if len(prompt) <= limit:
            low, best = units, prompt
        else:
            high = units
    return best
