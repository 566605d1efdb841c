"""Needles in a haystack: magic numbers between the sentences of a text.

RULER (Hsieh et al. 2024, arXiv:2404.06654), tasks S-NIAH, MK-NIAH, MV-NIAH and MQ-NIAH: keys are
words, values are numbers of seven digits, the haystack is prose.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .haystack import Haystack, hide
from .sample import Draft
from .vocabulary import names, numbers

DIGITS = 7


def needles(
    keys: int = 1, values: int = 1, queries: int = 1
) -> Callable[[Haystack, np.random.Generator, int], Draft]:
    """A task that hides ``values`` numbers for each of ``keys`` keys and asks for ``queries``."""

    def draft(haystack: Haystack, rng: np.random.Generator, limit: int) -> Draft:
        named = ["-".join(name) for name in names(rng, keys)]
        numbered = iter(numbers(rng, keys * values, DIGITS))
        pairs = [(key, next(numbered)) for key in named for _ in range(values)]
        hidden = [_needle(*pairs[i]) for i in rng.permutation(len(pairs)).tolist()]
        depths = np.sort(rng.random(len(pairs))).tolist()
        tokens = haystack.tokens(rng, limit)
        question, prefix = _asked(named[:queries], several=queries * values > 1)
        return Draft(
            intro="Some special magic numbers are hidden within the following text. Make sure to "
            "memorize them. I will quiz you about the numbers afterwards.\n",
            context=lambda units: hide(haystack.decoded(tokens[:units]), hidden, depths),
            question=f"\n{question}",
            answer_prefix=prefix,
            expected=tuple(value for key, value in pairs if key in named[:queries]),
        )

    return draft


def _needle(key: str, value: str) -> str:
    return f"One of the special magic numbers for {key} is: {value}."


def _asked(keys: list[str], several: bool) -> tuple[str, str]:
    """The question and the beginning of its answer."""
    about = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    said = f"for {about} mentioned in the provided text"
    if several:
        return (
            f"What are all the special magic numbers {said}?",
            f" The special magic numbers {said} are",
        )
    return f"What is the special magic number {said}?", f" The special magic number {said} is"
