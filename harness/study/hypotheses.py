"""What a study tests: stated with its settings, before anything is measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import UsageError

_EXAMPLE = "like {better: h2o, worse: streaming} or {method: h2o, at_most: {0.5: 0.04}}"


@dataclass(frozen=True)
class Hypothesis:
    """Either ``better`` costs less loss than ``worse``, or ``method`` costs at most so much."""

    better: str = ""
    worse: str = ""
    method: str = ""
    at_most: Mapping[float, float] = field(default_factory=dict)
    """Sparsity to a share of dense's perplexity: 0.04 is 4% more."""

    @classmethod
    def parse(cls, value: Any) -> Hypothesis:
        """From a study's file.

        Raises:
            UsageError: it is none.

        """
        names = set(value) if isinstance(value, Mapping) else set()
        if names == {"better", "worse"} and all(isinstance(v, str) for v in value.values()):
            if value["better"] != value["worse"]:
                return cls(**value)
        elif names == {"method", "at_most"} and isinstance(value["method"], str):
            limits = value["at_most"] if isinstance(value["at_most"], Mapping) else {}
            pairs = {_share(k): _share(v) for k, v in limits.items() if not isinstance(v, str)}
            if limits and len(pairs) == len(limits) and None not in (*pairs, *pairs.values()):
                return cls(method=value["method"], at_most=pairs)  # type: ignore[arg-type]
        raise UsageError(f"hypothesis {value!r} cannot be read; give one {_EXAMPLE}")

    @property
    def methods(self) -> tuple[str, ...]:
        """Those that it speaks of."""
        return (self.method,) if self.method else (self.better, self.worse)


def check_hypotheses(values: Iterable[Any]) -> None:
    """Refuse what is no hypothesis.

    Raises:
        UsageError: which one.

    """
    for value in values:
        Hypothesis.parse(value)


def untestable(values: Iterable[Any], methods: Iterable[str]) -> list[str]:
    """A sentence for each hypothesis about what is not among a study's methods."""
    known = set(methods)
    return [
        f"hypothesis {value!r} is not tested, as {name} is no method of the study"
        for value in values
        for name in Hypothesis.parse(value).methods
        if name not in known
    ]


def _share(number: Any) -> float | None:
    """A sparsity or a limit; of a stored study, whose keys are texts, also as text."""
    try:
        value = math.nan if isinstance(number, bool) else float(number)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) and value >= 0 else None
