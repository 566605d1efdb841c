"""What a bench run is measured on, and the batch that measures it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vllm_plugins.config import EvictionConfig

from ..records.specifications import BATCH
from .run import Run, without_defaults


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
    prefix_caching: bool = False
    """Whether requests share what their prompts have in common; of either side."""
    startup_timeout_s: float = field(default=600.0, compare=False)
    batch_timeout_s: float = field(default=3600.0, compare=False)
    model_path: str = field(default="", compare=False)

    def to_dict(self) -> dict[str, Any]:
        """As records have it: what does not differ between machines, and as in older records."""
        values = asdict(self)
        for name in ("startup_timeout_s", "batch_timeout_s", "model_path"):
            del values[name]
        return without_defaults(values, {"prefix_caching": False})

    @property
    def min_blocks(self) -> int:
        """So many blocks of a request stay, whatever its sparsity."""
        return (self.eviction or {}).get("min_blocks", EvictionConfig.min_blocks)


_LATER_FIELDS = {"shared_tokens": 0, "turns": 1, "turn_tokens": 0, "beam_width": 1}


@dataclass(frozen=True)
class Batch:
    """Requests of random tokens that are all there at the start, from empty to done.

    With ``turns`` each is a conversation: when all are answered, each is asked again.
    """

    num_requests: int
    prompt_tokens: int
    output_tokens: int
    """Every request makes exactly so many, in each turn."""
    warm_up_requests: int = 2
    """Before a method's first batch on an engine: first steps are slow."""
    warm_up_output_tokens: int = 8
    shared_tokens: int = 0
    """The first so many tokens are the same in every prompt."""
    turns: int = 1
    turn_tokens: int = 0
    """After each turn a conversation's prompt is all that was said, and so many new tokens."""
    beam_width: int = 1
    """More than 1: vLLM's beam search, which asks for each token of each beam by a request of its
    own, and hands on no settings of requests: a method is its engine's."""
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
        more = (self.turns - 1) * self.turn_tokens
        return self.prompt_tokens + more + self.turns * self.output_tokens

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
            turns=min(2, self.turns),
        )

    def file_suffix(self, run: Run[Any, Any]) -> str:
        return f"_seed{run.seed}"

    def request_tokens(self, engine: BatchEngineSpecification) -> int | None:
        return self.max_tokens if self.turns == 1 and self.beam_width == 1 else None

    def to_dict(self) -> dict[str, Any]:
        """As records and the engine's process have it; without sharing as in older records."""
        values = asdict(self)
        del values["study_load"]
        return without_defaults(values, _LATER_FIELDS)

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
    return {
        "method": run.method.to_dict(),
        "sparsity": run.budget.sparsity,
        "budget_tokens": run.budget.tokens,
        "seed": run.seed,
        "engine": run.resource.to_dict(),
        "load": load,
        **({} if study_load is None else {"study_load": study_load}),
    }
