"""Words to count: the most common ones of a list, the most frequent ones of a coded text.

RULER (Hsieh et al. 2024, arXiv:2404.06654), tasks CWE and FWE.
"""

from __future__ import annotations

import numpy as np

from ...errors import UsageError
from .haystack import Haystack
from .sample import Draft

NUM_COMMON = 10
_LONG = 4096
"""From so many tokens on a list has RULER's counts for long contexts."""
_FREQUENCIES = {False: (6, 1), True: (30, 3)}
"""How often a common and any other word stand in a list."""
NUM_FREQUENT = 3
_LEAST = 100
"""Entries of a coded text: of fewer the third word would not stand out."""
_ALPHA = 2.0
"""Of the zeta distribution that a coded text's words follow."""


def common_words(haystack: Haystack, rng: np.random.Generator, limit: int) -> Draft:
    """A numbered list of the text's own words, ten of which stand there more often."""
    common, other = _FREQUENCIES[limit >= _LONG]
    words = haystack.words
    order = rng.permutation(len(words))
    shuffle = int(rng.integers(2**31))

    def listed(units: int) -> str:
        if NUM_COMMON + units > len(words):
            raise UsageError(
                f"the text has {len(words):,} different words of four to ten letters, too few for "
                "task common_words at this --context-length; lower it or give a longer text"
            )
        chosen = [words[i] for i in order[: NUM_COMMON + units]]
        entries = chosen[:NUM_COMMON] * common + chosen[NUM_COMMON:] * other
        places = np.random.default_rng(shuffle).permutation(len(entries)).tolist()
        return " ".join(f"{n}. {entries[place]}" for n, place in enumerate(places, 1))

    expected = tuple(words[i] for i in order[:NUM_COMMON].tolist())
    return Draft(
        intro="Below is a numbered list of words. In these words, some appear more often than "
        "others. Memorize the ones that appear most often.\n",
        context=listed,
        question=f"\nQuestion: What are the {NUM_COMMON} most common words in the above list?",
        answer_prefix=f" Answer: The top {NUM_COMMON} words that appear most often in the list "
        "are:",
        expected=expected,
        tokens_per_unit=5.0 * other,
    )


def frequent_words(haystack: Haystack, rng: np.random.Generator, limit: int) -> Draft:
    """A coded text of invented words, of which the three most frequent ones are asked for. The
    most frequent entry of all is dots, as noise."""
    shuffle = int(rng.integers(2**31))
    count = int(limit**0.5) + NUM_FREQUENT + 2
    coded = ["...", *_coded(rng, count)]
    share = np.arange(1, len(coded) + 1) ** -_ALPHA
    share /= share.sum()

    def text(units: int) -> str:
        counts = np.maximum(np.round((_LEAST + units) * share), 1).astype(int)
        entries = np.repeat(np.arange(len(coded)), counts)
        drawn = np.random.default_rng(shuffle).permutation(entries).tolist()
        return " ".join(coded[i] for i in drawn)

    return Draft(
        intro="Read the following coded text and track the frequency of each coded word. Find the "
        "three most frequently appeared coded words.\n",
        context=text,
        question="\nQuestion: Do not provide any explanation. Please ignore the dots '...'. What "
        "are the three most frequently appeared words in the above coded text?",
        answer_prefix=" Answer: According to the coded text above, the three most frequently "
        "appeared words are:",
        expected=tuple(coded[1 : NUM_FREQUENT + 1]),
        tokens_per_unit=3.0,
    )


def _coded(rng: np.random.Generator, count: int) -> list[str]:
    """Invented words of six letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(map(chr, rng.integers(ord("a"), ord("z") + 1, size=6).tolist()))] = None
    return list(found)
