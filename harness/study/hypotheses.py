"""What a study tests: stated with its settings, before anything is measured."""

from __future__ import annotations

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
            return cls(**value)
        if names == {"method", "at_most"} and isinstance(value["at_most"], Mapping):
            numbers = [*value["at_most"], *value["at_most"].values()]
            try:
                pairs = {float(k): float(v) for k, v in value["at_most"].items()}
            except (TypeError, ValueError):
                pairs = {}
            if numbers and len(pairs) == len(value["at_most"]):
                return cls(method=str(value["method"]), at_most=pairs)
        raise UsageError(f"hypothesis {value!r} cannot be read; give one {_EXAMPLE}")


def check_hypotheses(values: Iterable[Any]) -> None:
    """Refuse what is no hypothesis.

    Raises:
        UsageError: which one.

    """
    for value in values:
        Hypothesis.parse(value)
