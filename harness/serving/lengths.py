"""Distributions of prompt and output lengths, in tokens. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import UsageError

_PARAMETERS = {
    "fixed": ("length",),
    "uniform": ("low", "high"),
    "normal": ("mean", "std"),
    "lognormal": ("median", "sigma"),
}


@dataclass(frozen=True)
class Lengths:
    """``fixed:N``, ``uniform:LOW:HIGH`` (both included), ``normal:MEAN:STD`` or
    ``lognormal:MEDIAN:SIGMA``."""

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
        if len(parameters) != len(_PARAMETERS.get(kind, "?")) or min(parameters) < 0:
            forms = ", ".join(
                ":".join((name, *map(str.upper, names))) for name, names in _PARAMETERS.items()
            )
            raise UsageError(f"length {text!r} is not a whole number or one of: {forms}")
        if parameters[0] < 1 or (kind == "uniform" and parameters[1] < parameters[0]):
            raise UsageError(f"length {text!r} allows no length of at least 1 token")
        return cls(kind, parameters)

    def draw(self, count: int, rng: np.random.Generator) -> list[int]:
        """``count`` whole lengths of at least 1."""
        a, b = (*self.parameters, 0.0)[:2]
        if self.kind == "fixed":
            values = np.full(count, a)
        elif self.kind == "uniform":
            values = rng.integers(int(a), int(b) + 1, size=count)
        elif self.kind == "normal":
            values = rng.normal(a, b, size=count)
        else:
            values = rng.lognormal(np.log(a), b, size=count)
        return np.maximum(1, np.rint(values)).astype(int).tolist()

    def __str__(self) -> str:
        return ":".join((self.kind, *(f"{value:g}" for value in self.parameters)))
