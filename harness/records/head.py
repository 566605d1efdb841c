"""What every record says first: which run it is, whatever was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from .parameters import policy_parameters
from .provenance import timestamp


class _Named(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def policy(self) -> str: ...
    @property
    def args(self) -> Mapping[str, Any]: ...
    @property
    def granularity(self) -> str | None: ...


class _Resource(Protocol):
    @property
    def eviction(self) -> Mapping[str, Any] | None: ...


class _Budget(Protocol):
    @property
    def sparsity(self) -> float: ...
    @property
    def tokens(self) -> int | None: ...


class RecordedRun(Protocol):
    """What a head needs of a run (``study.run.Run``)."""

    @property
    def kind(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def method(self) -> _Named: ...
    @property
    def resource(self) -> _Resource: ...
    @property
    def budget(self) -> _Budget: ...
    @property
    def level(self) -> str: ...
    @property
    def effective_sparsity(self) -> float | None: ...
    @property
    def seed(self) -> int: ...
    @property
    def hash(self) -> str: ...


def record_head(run: RecordedRun, schema_version: int) -> dict[str, Any]:
    """The first fields of a run's record, finished or failed.

    ``parameters`` are the policy's, with what defaults mean. ``effective_sparsity`` is what the
    budget comes to; None where requests differ in length.
    """
    method = run.method
    return {
        "schema_version": schema_version,
        "kind": run.kind,
        "timestamp": timestamp(),
        "key": run.key,
        "method": method.name,
        "policy": method.policy,
        "parameters": policy_parameters(
            method.policy, method.args, method.granularity, run.resource.eviction
        ),
        "sparsity": run.budget.sparsity,
        "budget_tokens": run.budget.tokens,
        "level": run.level,
        "effective_sparsity": run.effective_sparsity,
        "seed": run.seed,
        "specification_hash": run.hash,
    }
