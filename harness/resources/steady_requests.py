"""The requests of a steady load, drawn: the same for every method that has the same seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..analysis.renewal import length_at_hand, new_length
from ..study.steady_load import SteadyLoad


@dataclass(frozen=True)
class DrawnRequest:
    """One request of the loop."""

    prompt: list[int]
    """Token ids; of an aged one also those that stand for the output so far."""
    output_tokens: int
    """That are still to come."""


def draw_request(
    load: SteadyLoad, seed: int, number: int, aged: bool, vocabulary: int
) -> DrawnRequest:
    """The ``number``-th request of a loop.

    Each number has a generator of its own. So methods that start a different number at an age get
    the same requests otherwise.

    Args:
        load: its lengths.
        seed: of the run.
        number: from 0 on, in order of arrival.
        aged: a sequence at hand in the steady state; else a new one.
        vocabulary: token ids are below it.

    """
    generator = np.random.default_rng([seed, number])
    of_length, of_age = generator.random(2)
    length, age = new_length(of_length, load.output_tokens), 0
    if aged:
        length = length_at_hand(of_length, load.output_tokens)
        age = int(of_age * length)
    prompt = generator.integers(0, vocabulary, size=load.prompt_tokens + age)
    return DrawnRequest(prompt.tolist(), length - age)
