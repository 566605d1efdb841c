"""What an answer scores, and what a free one is like. Pure."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

from ..inputs.tasks.sample import ALL, CONTAINS, EXACT, F1

REPEATED = 4
"""Tokens of a run that may repeat."""
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def score(metric: str, answer: str, expected: Sequence[str]) -> float:
    """A score from 0 to 1, higher is better. Case does not count.

    - ``all``: the share of the expected strings that the answer contains, as RULER's string match
      (Hsieh et al. 2024, arXiv:2404.06654);
    - ``contains``: 1 if it contains any of them;
    - ``exact``: 1 if its first line that is not empty is one of them, but for space around it and
      a full stop at its end;
    - ``f1``: F1 of its words and those of the closest one, without articles and punctuation, as
      SQuAD's (Rajpurkar et al. 2016, arXiv:1606.05250).

    Raises:
        ValueError: nothing is expected.

    """
    if not expected:
        raise ValueError("a score without anything expected")
    return _METRICS[metric](answer.lower(), [text.lower() for text in expected])


def repetition(tokens: Sequence[int], length: int = REPEATED) -> float:
    """The share of runs of ``length`` tokens that have been there before; 0 of a shorter answer."""
    runs = [tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def same_beginning(first: Sequence[int], second: Sequence[int]) -> float:
    """The share of the longer answer's tokens before the first difference; 1 of two empty ones."""
    longest = max(len(first), len(second))
    same = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )
    return same / longest if longest else 1.0


def unigram_f1(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """F1 of two sequences as bags: 1 for the same items, 0 without a common one."""
    if not first or not second:
        return float(not first and not second)
    common = (Counter(first) & Counter(second)).total()
    return 2 * common / (len(first) + len(second))


def _all(answer: str, expected: Sequence[str]) -> float:
    return sum(text in answer for text in expected) / len(expected)


def _contains(answer: str, expected: Sequence[str]) -> float:
    return float(any(text in answer for text in expected))


def _exact(answer: str, expected: Sequence[str]) -> float:
    line = next((line for line in map(_bare, answer.splitlines()) if line), "")
    return float(line in map(_bare, expected))


def _bare(text: str) -> str:
    return text.strip().removesuffix(".").strip()


def _f1(answer: str, expected: Sequence[str]) -> float:
    return max(unigram_f1(_words(answer), _words(text)) for text in expected)


def _words(text: str) -> list[str]:
    plain = text.translate(str.maketrans("", "", string.punctuation))
    return _ARTICLES.sub(" ", plain).split()


_METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    ALL: _all,
    CONTAINS: _contains,
    EXACT: _exact,
    F1: _f1,
}
