"""One measurement of any kind, completely specified, and the hash that tells two apart.

A kind of study has a resource, what has to be started (``EngineSpecification``,
``ServerSpecification``, ``BatchEngineSpecification``), and a measurement, what is done on it
(``Perplexity``, ``Throughput``, ``HttpLoad``, ``Batch``). All else is the same for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

from ..records.specifications import DENSE, STOCK, comparison, digest, effective_sparsity, level


@dataclass(frozen=True)
class Method:
    """A policy with its parameters, under the name that tables and figures use."""

    name: str
    policy: str
    args: dict[str, Any] = field(default_factory=dict)
    granularity: str | None = None
    """``block`` or ``token``; None: the engine's."""

    def to_dict(self) -> dict[str, Any]:
        """As records have it; a granularity only where the method names one."""
        own = {} if self.granularity is None else {"granularity": self.granularity}
        return {"name": self.name, "policy": self.policy, "args": self.args, **own}


@dataclass(frozen=True)
class Budget:
    """What a request may keep: a share of its blocks goes, or it keeps so many tokens."""

    sparsity: float = 0.0
    tokens: int | None = None
    """In place of ``sparsity``, where it is given."""

    @property
    def level(self) -> str:
        """Runs of equal level are compared: ``s0.9``, or ``b256`` for a budget in tokens."""
        return level(self.sparsity, self.tokens)


class Resource(Protocol):
    """What a run is measured on."""

    @property
    def block_size(self) -> int: ...
    @property
    def min_blocks(self) -> int:
        """So many blocks of a request stay, whatever its sparsity."""


class Measurement(Protocol):
    """What is measured, and how its record is stored."""

    @property
    def kind(self) -> str:
        """``kind`` of the record."""

    @property
    def key_suffix(self) -> str:
        """What a key says beyond method and budget: ``_rate4``."""

    def file_suffix(self, run: Any) -> str:
        """What the name of a record says beyond its key: ``_ctx1024_seed0``."""

    def request_tokens(self, resource: Any) -> int | None:
        """Tokens of a request at its end; None: requests differ."""

    def stored(self, run: Any) -> dict[str, Any]:
        """The run as plain JSON values, without what differs between machines."""


ResourceT = TypeVar("ResourceT", bound=Resource, covariant=True)
MeasurementT = TypeVar("MeasurementT", bound=Measurement, covariant=True)


@dataclass(frozen=True)
class Run(Generic[ResourceT, MeasurementT]):
    """One method under one budget, on one seed's input, for one measurement."""

    resource: ResourceT
    method: Method
    budget: Budget
    seed: int
    measurement: MeasurementT

    @property
    def kind(self) -> str:
        """``kind`` of the run's record."""
        return self.measurement.kind

    @property
    def level(self) -> str:
        """See ``Budget.level``."""
        return self.budget.level

    @property
    def key(self) -> str:
        """Key of the run's method and budget in ``aggregated_results.json``."""
        return f"{self.method.name}_{self.level}{self.measurement.key_suffix}"

    @property
    def file_name(self) -> str:
        """Name of the run's record."""
        return f"{self.key}{self.measurement.file_suffix(self)}.json"

    @property
    def settings(self) -> dict[str, Any]:
        """Per-request settings (``SamplingParams.extra_args``); none for stock vLLM."""
        if self.method.policy == STOCK:
            return {}
        settings: dict[str, Any] = {"kv_policy": self.method.policy}
        if self.method.args:
            settings["kv_policy_args"] = self.method.args
        if self.method.granularity is not None:
            settings["kv_granularity"] = self.method.granularity
        if self.budget.tokens is not None:
            settings["kv_budget_tokens"] = self.budget.tokens
        elif self.method.policy != DENSE:
            settings["kv_sparsity"] = self.budget.sparsity
        return settings

    @cached_property
    def _stored(self) -> dict[str, Any]:
        return self.measurement.stored(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything that the run's figures depend on, as plain JSON values."""
        return dict(self._stored)

    @cached_property
    def hash(self) -> str:
        """The same for the same run on every machine."""
        return digest(self._stored)

    @property
    def comparison(self) -> str:
        """Shared by runs that may stand in one table: all but method, budget and seed."""
        return comparison(self._stored)

    @property
    def effective_sparsity(self) -> float | None:
        """What the budget comes to at a request's end; None where requests differ in length."""
        tokens = self.measurement.request_tokens(self.resource)
        if self.budget == Budget():
            return 0.0
        if tokens is None:
            return None
        return effective_sparsity(
            self.budget.sparsity,
            self.budget.tokens,
            tokens,
            self.resource.block_size,
            self.resource.min_blocks,
        )


def without_defaults(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Settings as records have them: one that came later is left out where it has its default, so
    that older records are of the same specification."""
    return {k: v for k, v in values.items() if k not in defaults or v != defaults[k]}
