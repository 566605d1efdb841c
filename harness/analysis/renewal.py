"""Renewal theory of a closed loop: each sequence that ends is replaced by a new one. Pure.

Outputs are uniform in ``a .. b``. Whoever looks at such a loop after a long time finds long
sequences more often than they begin: the length of one at hand is drawn with weights proportional
to length, and its age is uniform below it (Feller, vol. II, XI.4). A loop that starts with such
sequences is in its steady state from the start.
"""

from __future__ import annotations

import math

Lengths = tuple[int, int]
"""The shortest and the longest output, in tokens."""


def mean_length(lengths: Lengths) -> float:
    """Of a new sequence's output."""
    return sum(lengths) / 2


def mean_age(lengths: Lengths) -> float:
    """Output tokens that a sequence at hand has, on average: ``E[L (L - 1) / 2] / E[L]``."""
    shortest, longest = lengths
    mean = mean_length(lengths)
    variance = ((longest - shortest + 1) ** 2 - 1) / 12
    return ((variance + mean**2) / mean - 1) / 2


def mean_live_tokens(
    prompt_tokens: int, lengths: Lengths, sparsity: float, budget_tokens: int | None = None
) -> float:
    """Tokens of a sequence at hand whose keys and values are there, on average; nominal.

    Args:
        prompt_tokens: of every sequence.
        lengths: of its output.
        sparsity: share of the tokens that is evicted.
        budget_tokens: in place of ``sparsity``: at most so many stay.

    """
    tokens = prompt_tokens + mean_age(lengths)
    return (1 - sparsity) * tokens if budget_tokens is None else min(tokens, budget_tokens)


def new_length(chance: float, lengths: Lengths) -> int:
    """Of a new sequence's output; ``chance`` is uniform in [0, 1)."""
    shortest, longest = lengths
    return shortest + int(chance * (longest - shortest + 1))


def length_at_hand(chance: float, lengths: Lengths) -> int:
    """Of the output of a sequence at hand; ``chance`` is uniform in [0, 1).

    The smallest ``L`` whose share ``a + .. + L`` of ``a + .. + b`` is above ``chance``.
    """
    shortest, longest = lengths
    below = shortest * (shortest - 1)
    share = below + chance * (longest * (longest + 1) - below)
    length = math.ceil((math.sqrt(1 + 4 * share) - 1) / 2)
    return min(max(length, shortest), longest)
