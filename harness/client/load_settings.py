"""One frozen record that says everything about a load."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import UsageError
from .arrivals import PROCESSES, WITH_RATE, requests_within
from .checks import MOST, check_numbers, check_request_settings
from .lengths import Lengths
from .slo import parse_slo

PROMPTS = ("random", "text", "trace")
_DRAWN = ("random", "text")
"""Prompts whose lengths are drawn."""


@dataclass(frozen=True)
class QualitySpecification:
    """Which share of the requests asks for prompt log-probs of known windows.

    The windows are those ``kv-eviction offline`` draws from the same dataset, seed, number and
    length, so that its figure is the one to compare with.
    """

    share: float = 0.0
    dataset: str = "canterbury"
    context_length: int = 512
    num_windows: int = 8
    chunk: int = 64
    """The server's ``--long-prefill-token-threshold``; checked against each window's steps."""


@dataclass(frozen=True)
class LoadSpecification:
    """A load, complete: with the same seed the same requests at the same intended times."""

    num_requests: int
    arrivals: str = "poisson"
    request_rate: float = math.inf
    burstiness: float = 1.0
    ramp_to: float | None = None
    max_concurrency: int | None = None
    """Requests in flight of a closed loop (``arrivals="closed"``)."""
    trace: str | None = None
    time_scale: float = 1.0
    max_tokens: int | None = None
    """Trace entries with more prompt and output tokens than this are left out."""
    prompts: str = "random"
    dataset: str = "canterbury"
    input_length: str = "fixed:512"
    output_length: str = "fixed:128"
    shared_prefix_length: int = 0
    shared_prefix_groups: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    """``vllm_xargs`` of every request: ``kv_policy``, ``kv_sparsity``, ``kv_budget_tokens``."""
    timeout_s: float = 600.0
    warm_up_s: float = 0.0
    cool_down_s: float = 0.0
    slo: dict[str, float] = field(default_factory=dict)
    """Per-request objectives for goodput: field name to the highest good value, ms."""
    seed: int = 0
    sample_interval_s: float = 1.0
    quality: QualitySpecification = field(default_factory=QualitySpecification)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> LoadSpecification:
        """Build from untyped values (a study file, the command line) and check them.

        Instead of ``num_requests`` they may have ``duration_s``: so many requests as the rate
        makes in that time.

        Raises:
            UsageError: the first thing that is wrong.

        """
        values = {name: value for name, value in values.items() if value is not None}
        for name, kinds in (("quality", dict), ("settings", dict), ("slo", (dict, list))):
            if not isinstance(values.get(name, {}), kinds):
                raise UsageError(f"{name} of a load is {values[name]!r}; give a mapping")
        quality = values.pop("quality", {})
        for name in ("input_length", "output_length"):
            if name in values:
                values[name] = str(Lengths.parse(str(values[name])))
        check_numbers(cls, values, "")
        check_numbers(QualitySpecification, quality, "quality-")
        if "request_rate" in values:
            values["request_rate"] = float(values["request_rate"])
        values["slo"] = parse_slo(values.get("slo", []))
        if ("num_requests" in values) == ("duration_s" in values):
            raise UsageError(
                "give one of --num-requests and --duration (num_requests, duration_s in a study)"
            )
        if "duration_s" in values:
            values["num_requests"] = requests_within(
                values.get("arrivals", cls.arrivals),
                values.pop("duration_s"),
                values.get("request_rate", cls.request_rate),
                values.get("ramp_to"),
            )
        try:
            specification = cls(quality=QualitySpecification(**quality), **values)
        except TypeError as error:
            name = str(error).partition("argument ")[2] or str(error)
            raise UsageError(f"unknown or missing load setting: {name}") from None
        specification._validate()
        return specification

    @property
    def open_loop(self) -> bool:
        """Whether requests are sent at their own times, whatever the server does."""
        return self.arrivals != "closed"

    def _validate(self) -> None:
        for name, value in (
            ("--num-requests", self.num_requests),
            ("--timeout", self.timeout_s),
            ("--time-scale", self.time_scale),
            ("--sample-interval", self.sample_interval_s),
            ("--shared-prefix-groups", self.shared_prefix_groups),
            ("--quality-windows", self.quality.num_windows),
            ("--quality-chunk", self.quality.chunk),
            ("--max-tokens", 1 if self.max_tokens is None else self.max_tokens),
        ):
            if not value > 0:
                raise UsageError(f"{name} is {value:g}; give a number above 0")
        if self.num_requests > MOST:
            raise UsageError(f"{self.num_requests:,} requests are more than the {MOST:,} of a load")
        for name, value in (
            ("--warm-up", self.warm_up_s),
            ("--cool-down", self.cool_down_s),
            ("--shared-prefix-length", self.shared_prefix_length),
            ("--seed", self.seed),
        ):
            if not value >= 0:
                raise UsageError(f"{name} is {value:g}; give a number of at least 0")
        if self.arrivals not in PROCESSES:
            raise UsageError(f"--arrivals {self.arrivals!r}; use one of: {', '.join(PROCESSES)}")
        if self.prompts not in PROMPTS:
            raise UsageError(f"--prompts {self.prompts!r}; use one of: {', '.join(PROMPTS)}")
        if (self.arrivals == "closed") != (self.max_concurrency is not None):
            raise UsageError(
                "--arrivals closed and --max-concurrency belong together; give both or neither"
            )
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise UsageError("--max-concurrency must be at least 1")
        if "trace" in (self.arrivals, self.prompts) and self.trace is None:
            raise UsageError("--arrivals trace and --prompts trace need --trace FILE")
        if not 0 <= self.quality.share < 1:
            raise UsageError(
                f"--quality-share is {self.quality.share:g}; give a number from 0 to below 1"
            )
        if self.quality.context_length < 2:
            raise UsageError("--quality-context-length must be at least 2 tokens")
        check_request_settings(self.settings)
        self._check_effect()

    def _check_effect(self) -> None:
        """Refuse what would be ignored in silence."""
        for name, value, default, arrivals in (
            ("--request-rate", self.request_rate, math.inf, WITH_RATE),
            ("--burstiness", self.burstiness, 1.0, ("gamma",)),
            ("--ramp-to", self.ramp_to, None, ("ramp",)),
            ("--time-scale", self.time_scale, 1.0, ("trace",)),
        ):
            if value != default and self.arrivals not in arrivals:
                raise UsageError(
                    f"{name} means nothing to --arrivals {self.arrivals}; leave it out, or use "
                    f"one of: {', '.join(arrivals)}"
                )
        for name, given, usual, prompts in (
            ("--dataset", self.dataset, LoadSpecification.dataset, ("text",)),
            ("--input-length", self.input_length, LoadSpecification.input_length, _DRAWN),
            ("--output-length", self.output_length, LoadSpecification.output_length, _DRAWN),
            ("--shared-prefix-length", self.shared_prefix_length, 0, _DRAWN),
        ):
            if given != usual and self.prompts not in prompts:
                raise UsageError(
                    f"{name} means nothing to --prompts {self.prompts}; leave it out, or use "
                    f"one of: {', '.join(prompts)}"
                )
        traced = "trace" in (self.arrivals, self.prompts)
        quality = self.quality == QualitySpecification() or self.quality.share
        for name, idle, needed in (
            ("--trace", self.trace is not None and not traced, "--arrivals or --prompts trace"),
            ("--max-tokens", self.max_tokens is not None and not traced, "a trace"),
            (
                "--shared-prefix-groups",
                self.shared_prefix_groups != 1 and not self.shared_prefix_length,
                "--shared-prefix-length",
            ),
            ("--quality-*", not quality, "--quality-share"),
        ):
            if idle:
                raise UsageError(
                    f"{name} means nothing without {needed}; leave it out, or add that"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; an infinite rate is the string ``inf``."""
        values = asdict(self)
        if math.isinf(self.request_rate):
            values["request_rate"] = "inf"
        return values
