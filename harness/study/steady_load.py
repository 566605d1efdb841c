"""A closed loop that is measured in its steady state: requests in all phases of their life."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..client.checks import MOST, check_numbers
from ..errors import UsageError
from ..records.specifications import STEADY
from .batch_specification import BatchEngineSpecification, stored_run
from .run import Run


@dataclass(frozen=True)
class SteadyLoad:
    """So many sequences of random tokens at any time: each that ends is replaced by a new one.

    The first ones start at an age (``analysis/renewal.py``), so that nobody has to wait until the
    loop forgets how it began.
    """

    num_sequences: int
    prompt_tokens: int
    output_tokens: tuple[int, int]
    """The shortest and the longest output; lengths are uniform between them."""
    settle_seconds: float = 10.0
    """From when every aged sequence has a token, or the pool is full, to the window's begin."""
    measured_seconds: float = 40.0
    study_load: dict[str, Any] | None = None
    """The study's load, where this one is a method's own."""

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> SteadyLoad:
        """From the settings of a study's file, names checked.

        Raises:
            UsageError: the first value that is wrong.

        """
        check_numbers(cls, values)
        for name in ("num_sequences", "prompt_tokens"):
            if values[name] < 1:
                raise UsageError(f"load.{name} is {values[name]}; give at least 1")
        lengths = values["output_tokens"]
        pair = isinstance(lengths, (list, tuple)) and len(lengths) == 2
        if not pair or any(type(length) is not int for length in lengths):
            raise UsageError(
                f"load.output_tokens is {lengths!r}; give the shortest and the longest output of "
                "a steady load, like [64, 8192]"
            )
        if not 1 <= lengths[0] <= lengths[1] <= MOST:
            raise UsageError(
                f"load.output_tokens is {list(lengths)}; give the shortest output, of at least 1 "
                f"token, then the longest, of at most {MOST:,}"
            )
        load = cls(**{**values, "output_tokens": tuple(lengths)})
        if load.settle_seconds < 0:
            raise UsageError(f"load.settle_seconds is {load.settle_seconds:g}; give at least 0")
        if not load.measured_seconds > 0:
            raise UsageError(
                f"load.measured_seconds is {load.measured_seconds:g}; give a number above 0"
            )
        return load

    @property
    def kind(self) -> str:
        return STEADY

    @property
    def key_suffix(self) -> str:
        return ""

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest request at its end."""
        return self.prompt_tokens + self.output_tokens[1]

    @property
    def size(self) -> int:
        """Units of a study's progress."""
        return self.num_sequences

    @property
    def warm_up(self) -> None:
        """None is needed: what comes before the window warms the engine up."""
        return None

    def file_suffix(self, run: Run[Any, Any]) -> str:
        return f"_seed{run.seed}"

    def request_tokens(self, engine: BatchEngineSpecification) -> None:
        return None

    def to_dict(self) -> dict[str, Any]:
        """As records and the engine's process have it."""
        values = {"kind": STEADY, **asdict(self), "output_tokens": list(self.output_tokens)}
        del values["study_load"]
        return values

    def stored(self, run: Run[Any, Any]) -> dict[str, Any]:
        return stored_run(run, self.to_dict(), self.study_load)
