"""What a serving run is measured on, and the load that measures it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from vllm_plugins.config import EvictionConfig

from ..client.lengths import Lengths
from ..client.load_settings import LoadSpecification
from ..errors import UsageError
from ..inputs.corpora import describe
from ..records.specifications import SERVING
from .run import Run


@dataclass(frozen=True)
class ServerSpecification:
    """What the servers of a study's point have in common.

    A run's method and budget are settings of its server too: one serves one method only.
    """

    model: str
    """Embedded name, folder's name, or hub id."""
    model_fingerprint: str
    block_size: int
    eviction: dict[str, Any] = field(default_factory=dict)
    """Server-wide eviction settings besides policy and budget."""
    server: dict[str, Any] = field(default_factory=dict)
    """Engine arguments and front-end flags of ``vllm serve``."""
    environment: dict[str, str] = field(default_factory=dict)
    warm_up_requests: int = 0
    startup_timeout_s: float = field(default=600.0, compare=False)
    vocabulary_size: int | None = field(default=None, compare=False)
    """Of a model without a tokenizer."""
    model_name: str = field(default="", compare=False)
    """As the study gives it: a folder, with its path."""
    model_path: str = field(default="", compare=False)

    @property
    def min_blocks(self) -> int:
        """So many blocks of a request stay, whatever its sparsity."""
        return self.eviction.get("min_blocks", EvictionConfig.min_blocks)


@dataclass(frozen=True)
class HttpLoad:
    """A load over HTTP, and what a run is held to."""

    load: LoadSpecification
    """At this run's rate and seed."""
    rate: float | None
    """Requests per second; None: a load without one."""
    slo: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return SERVING

    @property
    def key_suffix(self) -> str:
        return "" if self.rate is None else f"_rate{self.rate:g}"

    def file_suffix(self, run: ServingRun) -> str:
        return f"_seed{run.seed}"

    def request_tokens(self, server: ServerSpecification) -> int | None:
        load = self.load
        if load.prompts == "trace" or load.trace is not None or load.quality.share:
            return None
        lengths = [Lengths.parse(text) for text in (load.input_length, load.output_length)]
        if any(length.kind != "fixed" for length in lengths):
            return None
        return load.shared_prefix_length + sum(int(length.parameters[0]) for length in lengths)

    def stored(self, run: ServingRun) -> dict[str, Any]:
        server = run.resource
        values = {
            "method": run.method.name,
            "policy": run.method.policy,
            **{k: v for k, v in run.method.to_dict().items() if k in ("args", "granularity")},
            "sparsity": run.budget.sparsity,
            "budget_tokens": run.budget.tokens,
            "request_rate": self.rate,
            "seed": run.seed,
            "model": server.model,
            "model_fingerprint": server.model_fingerprint,
            "block_size": server.block_size,
            "eviction": server.eviction,
            "server": server.server,
            "environment": server.environment,
            "warm_up_requests": server.warm_up_requests,
            "slo": self.slo,
        }
        if self.files:
            values["files"] = self.files
        return {**values, "load": self.load.to_dict()}

    @cached_property
    def files(self) -> dict[str, str]:
        """SHA-256 of each local file the load reads: a name alone would not tell two apart.

        Raises:
            UsageError: one cannot be read.

        """
        load = self.load
        read = [load.dataset] if load.prompts == "text" else []
        read += [load.quality.dataset] if load.quality.share else []
        texts = [describe(name, None, "concatenate") for name in read]
        files = {text.dataset: text.sha256 for text in texts if text.dataset_path and text.sha256}
        if load.trace is not None:
            trace = Path(load.trace)
            try:
                files[trace.name] = hashlib.sha256(trace.read_bytes()).hexdigest()
            except OSError as error:
                raise UsageError(f"cannot read trace {trace}: {error.strerror}") from None
        return files


ServingRun: TypeAlias = Run[ServerSpecification, HttpLoad]


def server_settings(run: ServingRun) -> Mapping[str, Any]:
    """Eviction settings of a run's server: one policy, and no request may ask for another."""
    eviction, policy = run.resource.eviction, run.method.policy
    args = {**eviction.get("policy_args", {}).get(policy, {}), **run.method.args}
    if run.method.granularity is not None:
        eviction = {**eviction, "granularity": run.method.granularity}
    budget = (
        {"sparsity": run.budget.sparsity}
        if run.budget.tokens is None
        else {"budget_tokens": run.budget.tokens}
    )
    fixed = {"request_policies": [], "request_granularity": "server"}
    settings = {**eviction, "policy": policy, **budget, **fixed}
    return settings | ({"policy_args": {policy: args}} if args else {})
