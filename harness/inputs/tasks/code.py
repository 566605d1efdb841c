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
_SHOWN = 2
"""Functions at the very beginning whose tests stand before the one to complete: they show a small
model what a test looks like."""
_FAR = 0.5
"""What is asked for stands in the first half."""


def code_completion(haystack: Haystack, rng: np.random.Generator, limit: int) -> Draft:
    """See the module. The study's text is not read."""
    count = limit // _TOKENS_PER_ENTRY + 2 + _SHOWN
    named = ["_".join(name) for name in names(rng, count, _SUFFIXES)]
    valued = numbers(rng, count, _DIGITS)
    depth = float(rng.random()) * _FAR
    pairs = list(zip(named, valued, strict=True))
    (asked, value), *shown = pairs[: 1 + _SHOWN]
    fillers = [
        _constant(*pair) if i % 2 else _function(*pair)
        for i, pair in enumerate(pairs[1 + _SHOWN :])
    ]

    def source(units: int) -> str:
        place = round(depth * units)
        return "\n".join([*fillers[:place], _function(asked, value), *fillers[place:units]])

    return Draft(
        intro="\n".join(['"""Settings of the service."""\n', *(_function(*p) for p in shown), ""]),
        context=source,
        question="\n\n# Tests: each function returns its value.\n"
        + "".join(f"{_test(name)} {number}\n" for name, number in shown),
        answer_prefix=_test(asked),
        expected=(value,),
        announced=f"# At the end of this file get_{asked} is tested.",
        tokens_per_unit=2.0 * _TOKENS_PER_ENTRY,
    )


def _function(name: str, value: str) -> str:
    return f"def get_{name}():\n    return {value}\n"


def _constant(name: str, value: str) -> str:
    return f"{name.upper()} = {value}\n"


def _test(name: str) -> str:
    return f"assert get_{name}() =="
