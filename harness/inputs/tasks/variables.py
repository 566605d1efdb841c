"""Variable tracking: a chain of assignments between the sentences of a text.

RULER (Hsieh et al. 2024, arXiv:2404.06654), task VT: one chain of four hops; all five names are
asked for. Like there, an example shows what an answer looks like.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from .haystack import Haystack, hide
from .sample import Draft
from .vocabulary import numbers

HOPS = 4
_LETTERS = 5
_EXAMPLE_VALUE, _EXAMPLE_NAMES = "7160", ("QSOLE", "WPTUN", "KDXIF")
"""Of four digits, so that it is no sample's."""
_EXAMPLE = (
    "VAR QSOLE = 7160. The grass is green. VAR WPTUN = VAR QSOLE. The sky is blue. "
    "VAR KDXIF = VAR WPTUN."
)
_INTRO = "Memorize and track the chain of variable assignments hidden in the following text.\n\n"


def variable_tracking(haystack: Haystack, rng: np.random.Generator, limit: int) -> Draft:
    """See the module."""
    named = _names(rng, HOPS + 1)
    (value,) = numbers(rng, 1, 5)
    lines = [f"VAR {named[0]} = {value}."]
    lines += [f"VAR {name} = VAR {former}." for former, name in pairwise(named)]
    depths = np.sort(rng.random(len(lines))).tolist()
    tokens = haystack.tokens(rng, limit)
    answered = _question(_EXAMPLE_VALUE) + _prefix(_EXAMPLE_VALUE, len(_EXAMPLE_NAMES))
    return Draft(
        intro=f"{_INTRO}{_EXAMPLE}{answered} {', '.join(_EXAMPLE_NAMES)}\n\n{_INTRO}",
        context=lambda units: hide(haystack.decoded(tokens[:units]), lines, depths),
        question=_question(value),
        answer_prefix=_prefix(value, len(named)),
        expected=tuple(named),
    )


def _question(value: str) -> str:
    return f"\nQuestion: Find all variables that are assigned the value {value} in the text above."


def _prefix(value: str, count: int) -> str:
    return (
        f" Answer: According to the chain of variable assignments in the text above, {count} "
        f"variables are assigned the value {value}, they are:"
    )


def _names(rng: np.random.Generator, count: int) -> list[str]:
    """Names of five capitals, none of them the example's."""
    found: dict[str, None] = {}
    while len(found) < count:
        name = "".join(map(chr, rng.integers(ord("A"), ord("Z") + 1, size=_LETTERS).tolist()))
        if name not in _EXAMPLE_NAMES:
            found[name] = None
    return list(found)
