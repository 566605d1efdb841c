"""The study's own text as the filler of tasks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np

from ...errors import UsageError

_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile(r"(?<![\w'-])[a-z]{4,10}(?![\w'-])")
_VOCABULARY_TOKENS = 1_000_000


class Haystack:
    """A text's documents in a row.

    Args:
        tokenizer: of Transformers.
        documents: tokens by document.

    """

    def __init__(self, tokenizer: Any, documents: Sequence[Sequence[int]]) -> None:
        self._tokenizer = tokenizer
        self._tokens = documents[0] if len(documents) == 1 else list(chain.from_iterable(documents))

    def tokens(self, rng: np.random.Generator, length: int) -> list[int]:
        """``length`` tokens from a random place on.

        Raises:
            UsageError: the text is shorter.

        """
        if len(self._tokens) < length:
            raise UsageError(
                f"the text has {len(self._tokens):,} tokens, fewer than a prompt of {length:,}; "
                f"lower --context-length or give a longer text"
            )
        start = int(rng.integers(0, len(self._tokens) - length + 1))
        return list(self._tokens[start : start + length])

    def decoded(self, tokens: Sequence[int]) -> str:
        """Whole words of ``tokens``: what is cut at an edge is left out."""
        text = self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        _, _, text = text.partition(" ")
        return text.rpartition(" ")[0].strip()

    @cached_property
    def words(self) -> list[str]:
        """Different words of four to ten plain letters, in order of the alphabet."""
        text = self.decoded(self._tokens[:_VOCABULARY_TOKENS])
        return sorted(set(_WORD.findall(text)))


def sentences(text: str) -> list[str]:
    """What may stand on either side of a needle: sentences, or words of a text without any."""
    found = [s for s in _SENTENCE.split(text) if s]
    return found if len(found) > 1 else text.split()


def hide(text: str, needles: Sequence[str], depths: Sequence[float]) -> str:
    """``text`` with each needle between two of its sentences.

    Args:
        text: the haystack.
        needles: sentences.
        depths: of each needle, ascending; 0 is the beginning, 1 the end.

    """
    pieces = sentences(text)
    made: list[str] = []
    done = 0
    for needle, depth in zip(needles, depths, strict=True):
        place = round(depth * len(pieces))
        made += [*pieces[done:place], needle]
        done = max(done, place)
    return " ".join([*made, *pieces[done:]])
