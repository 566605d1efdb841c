"""One frozen record that says everything about a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_plugins.config import EvictionConfig, parse_sparsity

from .errors import UsageError

DENSE = "dense"


@dataclass(frozen=True)
class EngineSpecification:
    """What one engine is started with; runs that share it share the engine."""

    model: str
    context_length: int
    prefill_chunk: int
    block_size: int
    max_num_seqs: int
    dtype: str = "float32"
    """Of weights, activations and KV cache; ``auto`` is the checkpoint's own."""
    eviction: dict[str, Any] = field(default_factory=dict)
    """Server-wide fields of ``EvictionConfig``, complete."""

    @property
    def max_num_batched_tokens(self) -> int:
        """A chunk of every window in flight fits into one step."""
        return self.prefill_chunk * self.max_num_seqs


@dataclass(frozen=True)
class RunSpecification:
    """One method at one sparsity on one seed's windows."""

    engine: EngineSpecification
    method: str
    sparsity: float
    dataset: str
    num_samples: int
    seed: int

    @property
    def key(self) -> str:
        """Key of the run's method and sparsity in ``aggregated_results.json``."""
        return f"{self.method}_s{self.sparsity:g}"

    @property
    def file_name(self) -> str:
        """Name of the run's record."""
        return f"{self.key}_ctx{self.engine.context_length}_seed{self.seed}.json"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def seeds_for(num_runs: int | None, seeds: Sequence[int] | None) -> tuple[int, ...]:
    """Seeds of the runs: as given, or 0, 1, ... for ``num_runs``.

    Raises:
        UsageError: the two contradict each other, or a seed is repeated or negative.

    """
    if seeds is None:
        return tuple(range(num_runs if num_runs is not None else 1))
    if num_runs is not None and num_runs != len(seeds):
        raise UsageError(f"--num-runs is {num_runs} but --seeds names {len(seeds)}; drop one")
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise UsageError("--seeds must be different whole numbers of at least 0")
    return tuple(seeds)


def runs_for(
    engine: EngineSpecification,
    methods: Sequence[str],
    sparsities: Sequence[Any],
    dataset: str,
    num_samples: int,
    seeds: Sequence[int],
) -> list[RunSpecification]:
    """Every run of a comparison: ``dense`` once a seed, other methods at every sparsity.

    Raises:
        UsageError: nothing to run. ``EvictionConfigError``: a method or sparsity is wrong.

    """
    config = EvictionConfig.parse(engine.eviction)
    pairs: list[tuple[str, float]] = []
    for method in methods:
        for sparsity in [0.0] if method == DENSE else sparsities:
            config.request_settings(settings_for(method, sparsity), engine.block_size)
            pair = (method, parse_sparsity("--sparsity", sparsity))
            if pair not in pairs:
                pairs.append(pair)
    if not pairs:
        raise UsageError("nothing to run; name at least one of --methods and one --sparsity")
    return [
        RunSpecification(engine, method, sparsity, dataset, num_samples, seed)
        for seed in seeds
        for method, sparsity in pairs
    ]


def settings_for(method: str, sparsity: Any) -> dict[str, Any]:
    """Per-request settings (``SamplingParams.extra_args``) of a method at a sparsity."""
    if method == DENSE:
        return {"kv_policy": DENSE}
    return {"kv_policy": method, "kv_sparsity": sparsity}
