"""Distributions of prompt and output lengths, in tokens. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..errors import UsageError

MOST_TOKENS = 10_000_000
"""Longer than any request that a server takes."""
_PARAMETERS = {
    "fixed": ("length",),
    "uniform": ("low", "high"),
    "normal": ("mean", "std"),
    "lognormal": ("median", "sigma"),
}


@dataclass(frozen=True)
class Lengths:
    """``fixed:N``, ``uniform:LOW:HIGH`` (both included), ``normal:MEAN:STD`` or
    ``lognormal:MEDIAN:SIGMA``; lengths are whole, those of a distribution are rounded."""

    kind: str
    parameters: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Read ``512`` (short for ``fixed:512``) or one of the forms above.

        Raises:
            UsageError: not one of them, or out of range.

        """
        kind, *rest = f"fixed:{text}".split(":") if text.isdigit() else text.split(":")
        try:
            parameters = tuple(float(value) for value in rest)
        except ValueError:
            parameters = ()
        finite = all(math.isfinite(value) and value >= 0 for value in parameters)
        if len(parameters) != len(_PARAMETERS.get(kind, "?")) or not finite:
            forms = ", ".join(
                ":".join((name, *map(str.upper, names))) for name, names in _PARAMETERS.items()
            )
            raise UsageError(f"length {text!r} is not a whole number or one of: {forms}")
        if parameters[0] < 1 or (kind == "uniform" and parameters[1] < parameters[0]):
            raise UsageError(f"length {text!r} allows no length of at least 1 token")
        if kind in ("fixed", "uniform") and not all(map(float.is_integer, parameters)):
            raise UsageError(f"length {text!r} is not in whole tokens")
        if max(parameters) > MOST_TOKENS:
            raise UsageError(_too_long(text))
        return cls(kind, parameters)

    def draw(self, count: int, rng: np.random.Generator) -> list[int]:
        """``count`` whole lengths of at least 1.

        Raises:
            UsageError: one is longer than any request.

        """
        a, b = (*self.parameters, 0.0)[:2]
        if self.kind == "fixed":
            values = np.full(count, a)
        elif self.kind == "uniform":
            values = rng.integers(int(a), int(b) + 1, size=count)
        elif self.kind == "normal":
            values = rng.normal(a, b, size=count)
        else:
            values = rng.lognormal(np.log(a), b, size=count)
        if not np.all(values <= MOST_TOKENS):
            raise UsageError(_too_long(str(self)))
        return np.maximum(1, np.rint(values)).astype(int).tolist()

    def __str__(self) -> str:
        return ":".join((self.kind, *(f"{value:.15g}" for value in self.parameters)))


def _too_long(text: str) -> str:
    return f"length {text!r} allows more than {MOST_TOKENS:,} tokens; lower it"
