"""Code completion: a file of functions and constants, and at its end a test of an early one.

In the manner of RULER's needles with distractors of their kind (Hsieh et al. 2024,
arXiv:2404.06654); the filler is generated, so that every line looks alike.
"""

from __future__ import annotations

import numpy as np

from .haystack import Haystack
from .sample import Draft
from .vocabulary import names, numbers

_SUFFIXES = (
    "limit",
    "count",
    "port",
    "size",
    "offset",
    "delay",
    "weight",
    "level",
    "index",
    "margin",
    "score",
)
_DIGITS = 5
_TOKENS_PER_ENTRY = 8
"""No entry is shorter."""
_FAR = 0.5
"""What is asked for stands in the first half."""


def code_completion(haystack: Haystack, rng: np.random.Generator, limit: int) -> Draft:
    """See the module. The study's text is not read."""
    count = limit // _TOKENS_PER_ENTRY + 2
    named = ["_".join(name) for name in names(rng, count, _SUFFIXES)]
    valued = numbers(rng, count, _DIGITS)
    depth = float(rng.random()) * _FAR
    asked, value = f"get_{named[0]}", valued[0]
    target = f"def {asked}():\n    return {value}\n"
    fillers = [_filler(i, named[i], valued[i]) for i in range(1, count)]

    def source(units: int) -> str:
        place = round(depth * units)
        return "\n".join([*fillers[:place], target, *fillers[place:units]])

    return Draft(
        intro='"""Settings of the service."""\n\n',
        context=source,
        question="\n\n# Test: the function returns its value.\n",
        answer_prefix=f"assert {asked}() ==",
        expected=(value,),
        announced=f"# At the end of this file {asked} is tested.",
        tokens_per_unit=2.0 * _TOKENS_PER_ENTRY,
    )


def _filler(number: int, name: str, value: str) -> str:
    if number % 2:
        return f"{name.upper()} = {value}\n"
    return f"def get_{name}():\n    return {value}\n"
