"""What a bench run is measured on, and the batch that measures it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vllm_plugins.config import EvictionConfig

from ..records.specifications import BATCH
from .run import Run


@dataclass(frozen=True)
class BatchEngineSpecification:
    """What one engine is started with, in a process of its own."""

    model: str
    """Embedded name, folder's name, or hub id."""
    model_fingerprint: str
    block_size: int
    eviction: dict[str, Any] | None
    """Server-wide fields of ``EvictionConfig``, complete; None: stock vLLM, without the plugin."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Engine arguments of vLLM, as the study gives them."""
    environment: dict[str, str] = field(default_factory=dict)
    start: int = 1
    """Equal engines of different numbers are started apart."""
    rounds: bool = False
    """Started anew for each seed."""
    startup_timeout_s: float = field(default=600.0, compare=False)
    batch_timeout_s: float = field(default=3600.0, compare=False)
    model_path: str = field(default="", compare=False)

    @property
    def min_blocks(self) -> int:
        """So many blocks of a request stay, whatever its sparsity."""
        return (self.eviction or {}).get("min_blocks", EvictionConfig.min_blocks)


@dataclass(frozen=True)
class Batch:
    """Requests of random tokens that are all there at the start, from empty to done."""

    num_requests: int
    prompt_tokens: int
    output_tokens: int
    """Every request makes exactly so many."""
    warm_up_requests: int = 2
    """Before a method's first batch on an engine: first steps are slow."""
    warm_up_output_tokens: int = 8
    study_load: dict[str, Any] | None = None
    """The study's load, where this one is a method's own."""

    @property
    def kind(self) -> str:
        return BATCH

    @property
    def key_suffix(self) -> str:
        return ""

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest request at its end."""
        return self.prompt_tokens + self.output_tokens

    @property
    def size(self) -> int:
        """Units of a study's progress."""
        return self.num_requests

    @property
    def warm_up(self) -> Batch:
        """A small batch that comes first: first steps are slow."""
        return replace(
            self,
            num_requests=min(self.warm_up_requests, self.num_requests),
            output_tokens=min(self.warm_up_output_tokens, self.output_tokens),
        )

    def file_suffix(self, run: Run[Any, Any]) -> str:
        return f"_seed{run.seed}"

    def request_tokens(self, engine: BatchEngineSpecification) -> int:
        return self.max_tokens

    def to_dict(self) -> dict[str, Any]:
        """As records and the engine's process have it."""
        values = asdict(self)
        del values["study_load"]
        return values

    def stored(self, run: Run[Any, Any]) -> dict[str, Any]:
        return stored_run(run, self.to_dict(), self.study_load)


def stored_run(
    run: Run[Any, Any], load: dict[str, Any], study_load: dict[str, Any] | None
) -> dict[str, Any]:
    """A bench run as its record tells it.

    Args:
        run: on an engine of a bench study.
        load: what it measures.
        study_load: the study's, where ``load`` is the method's own. By it records of a study with
            several loads are known as one study's (``records.batch.study_load``).

    """
    engine = asdict(run.resource)
    for name in ("startup_timeout_s", "batch_timeout_s", "model_path"):
        del engine[name]
    return {
        "method": run.method.to_dict(),
        "sparsity": run.budget.sparsity,
        "budget_tokens": run.budget.tokens,
        "seed": run.seed,
        "engine": engine,
        "load": load,
        **({} if study_load is None else {"study_load": study_load}),
    }
