"""Frozen records that say everything about a run, and the hash that tells two runs apart."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..inputs.text import Text
from ..records.specifications import DENSE, comparison, digest, effective_sparsity, level

PERPLEXITY, THROUGHPUT = "perplexity", "throughput"
PROTOCOLS = ("chunked", "decode")
_NOT_RECORDED = ("model_path", "dataset_path")


@dataclass(frozen=True)
class EngineSpecification:
    """What one engine is started with; runs that share it share the engine.

    ``model_path`` is where the model lies on this machine: no part of records and hashes.
    """

    model: str
    """Embedded name, folder's name, or hub id."""
    model_fingerprint: str
    """Tells two models of one name apart: hash of the configuration and the weights' sizes."""
    context_length: int
    prefill_chunk: int
    block_size: int
    max_num_seqs: int
    kv_pool_windows: int
    """The pool holds so many whole windows; as many are scored at a time."""
    enforce_eager: bool
    dtype: str = "float32"
    """Of weights, activations and KV cache; ``auto`` is the checkpoint's own."""
    protocol: str = "chunked"
    eviction: dict[str, Any] = field(default_factory=dict)
    """Server-wide fields of ``EvictionConfig``, complete."""
    model_path: str = field(default="", compare=False)

    @property
    def max_num_batched_tokens(self) -> int:
        """A chunk of every window in flight fits into one step."""
        return max(self.prefill_chunk * self.kv_pool_windows, self.max_num_seqs)


@dataclass(frozen=True)
class Method:
    """A policy with its parameters, under the name that tables and figures use."""

    name: str
    policy: str
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Load:
    """A saturating offline load: all requests are there at the start."""

    num_requests: int
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class RunSpecification:
    """One method at one sparsity or budget, on one seed's windows, for one measurement."""

    engine: EngineSpecification
    method: Method
    text: Text
    seed: int
    sparsity: float = 0.0
    budget_tokens: int | None = None
    num_samples: int = 0
    min_context: int = 1
    """First token of a window that is scored."""
    load: Load | None = None
    """Given: throughput is measured under it; None: perplexity."""

    @property
    def measure(self) -> str:
        return PERPLEXITY if self.load is None else THROUGHPUT

    @property
    def level(self) -> str:
        """Runs of equal level are compared: ``s0.9``, or ``b256`` for a budget in tokens."""
        return level(self.sparsity, self.budget_tokens)

    @property
    def key(self) -> str:
        """Key of the run's method and sparsity in ``aggregated_results.json``."""
        return f"{self.method.name}_{self.level}"

    @property
    def file_name(self) -> str:
        """Name of the run's record."""
        kind = "seed" if self.measure == PERPLEXITY else "load"
        return f"{self.key}_ctx{self.engine.context_length}_{kind}{self.seed}.json"

    @property
    def settings(self) -> dict[str, Any]:
        """Per-request settings (``SamplingParams.extra_args``)."""
        settings: dict[str, Any] = {"kv_policy": self.method.policy}
        if self.method.args:
            settings["kv_policy_args"] = self.method.args
        if self.budget_tokens is not None:
            settings["kv_budget_tokens"] = self.budget_tokens
        elif self.method.policy != DENSE:
            settings["kv_sparsity"] = self.sparsity
        return settings

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without what differs between machines."""
        values = asdict(self)
        for part in ("engine", "text"):
            for name in _NOT_RECORDED:
                values[part].pop(name, None)
        return {"dataset": self.text.dataset, **values}

    @property
    def hash(self) -> str:
        """The same for the same run on every machine."""
        return digest(self.to_dict())

    @property
    def comparison(self) -> str:
        """Shared by runs that may stand in one table: all but method, level and seed."""
        return comparison(self.to_dict())

    @property
    def effective_sparsity(self) -> float:
        """The share of a whole window's blocks that the run evicts; see the function."""
        return effective_sparsity(self.to_dict())
