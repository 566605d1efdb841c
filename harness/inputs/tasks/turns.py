"""Several turns of a conversation: facts in the first one, a question on one of them in the last.

Between them the assistant has answered with the study's own text. As in RULER (Hsieh et al. 2024,
arXiv:2404.06654) the prompt is plain text, without a chat template, and ends with the beginning of
the answer.
"""

from __future__ import annotations

import numpy as np

from .haystack import Haystack
from .sample import Draft
from .vocabulary import numbers

NUM_FACTS = 4
NUM_TURNS = 4
_DIGITS = 5
_THINGS = (
    "locker code",
    "train number",
    "member number",
    "phone extension",
    "room number",
    "order number",
    "parking space",
    "alarm code",
)
_REQUESTS = (
    "Please read me a passage of the book.",
    "Thank you. How does it go on?",
    "Good. Please read a little more.",
    "I see. What comes next?",
)


def multi_turn(haystack: Haystack, rng: np.random.Generator, limit: int) -> Draft:
    """See the module."""
    things = [_THINGS[i] for i in rng.permutation(len(_THINGS))[:NUM_FACTS].tolist()]
    values = numbers(rng, NUM_FACTS, _DIGITS)
    asked = int(rng.integers(NUM_FACTS))
    tokens = haystack.tokens(rng, limit)
    facts = " ".join(f"My {thing} is {value}." for thing, value in zip(things, values, strict=True))

    def turns(units: int) -> str:
        share = units // NUM_TURNS
        parts = [tokens[i * share : (i + 1) * share] for i in range(NUM_TURNS)]
        parts[-1] = tokens[(NUM_TURNS - 1) * share : units]
        return "\n".join(
            f"User: {request}\nAssistant: {haystack.decoded(part)}"
            for request, part in zip(_REQUESTS, parts, strict=True)
        )

    return Draft(
        intro=f"User: Please remember these facts about me. {facts}\n"
        "Assistant: I will remember them.\n",
        context=turns,
        question=f"\nUser: What is my {things[asked]}?",
        answer_prefix=f"\nAssistant: Your {things[asked]} is",
        expected=(values[asked],),
        announced=f"User: At the end I will ask for my {things[asked]}.",
    )
