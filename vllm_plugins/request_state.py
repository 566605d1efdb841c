"""Everything the scheduler knows of one request between its admission and its end. No vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from .live_blocks import LiveBlocks
from .request_settings import RequestSettings


class RequestLike(Protocol):
    """The part of ``vllm.v1.request.Request`` that decisions depend on."""

    request_id: str
    num_prompt_tokens: int
    num_computed_tokens: int

    @property
    def num_tokens(self) -> int: ...

    num_preemptions: int

    def is_finished(self) -> bool: ...


@dataclass
class RequestState:
    """One request: what it follows, its live blocks by layer group, and its record.

    ``num_scored_tokens``: tokens that the newest reported scores include. ``in_flight``: step to
    the tokens the request has after it, for steps whose scores have not come back.
    """

    request: RequestLike
    settings: RequestSettings
    seed: int
    groups: list[LiveBlocks]
    num_scored_tokens: int = 0
    in_flight: dict[int, int] = field(default_factory=dict)
    steps: int = 0
    blocks_steps: float = 0.0
    record: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def begin(
        cls, request: RequestLike, settings: RequestSettings, seed: int, num_groups: int
    ) -> RequestState:
        """The state of a request that has just arrived."""
        state = cls(request, settings, seed, [LiveBlocks() for _ in range(num_groups)])
        state.restart()
        state.record = {
            "policy": settings.policy,
            "granularity": settings.granularity,
            "sparsity": settings.sparsity,
            "budget_tokens": settings.budget_tokens,
            "blocks_evicted": 0,
            "decisions": 0,
            "decision_seconds": 0.0,
            "first_eviction_tokens": None,
            "peak_blocks": 0.0,
            "peak_pool_blocks": 0,
        }
        return state

    @property
    def num_tokens(self) -> int:
        """Tokens that a relative budget is a share of: the whole prompt counts from the start."""
        return max(self.request.num_prompt_tokens, self.request.num_tokens)

    def restart(self) -> None:
        """Forget what died with the blocks of a preempted request."""
        self.groups = [LiveBlocks() for _ in self.groups]
        self.num_scored_tokens = 0
        self.in_flight.clear()

    def scores_arrived(self, step: int) -> None:
        """The reported scores include every step up to ``step``."""
        for done in [s for s in self.in_flight if s <= step]:
            self.num_scored_tokens = max(self.num_scored_tokens, self.in_flight.pop(done))

    def note_decision(self, group: int, num_tokens: int, num_evicted: int, seconds: float) -> None:
        """Record a decision over the first ``num_tokens`` tokens of ``group``."""
        record = self.record
        record["decisions"] += 1
        record["decision_seconds"] += seconds
        record["blocks_evicted"] += num_evicted
        if record["first_eviction_tokens"] is None:
            record["first_eviction_tokens"] = num_tokens
        if "trace" in record:
            kept = self.groups[group].positions.tolist()
            entry = {"group": group, "tokens": num_tokens, "kept": kept}
            if self.settings.rule is not None:
                # Physical blocks: which tokens fill them, the workers alone know.
                num_recent = self.settings.rule.num_recent(len(kept))
                entry["region"] = self.groups[group].block_ids[: len(kept) - num_recent].tolist()
            record["trace"].append(entry)

    def note_blocks(self, num_table_blocks: int, num_pool_blocks: int) -> None:
        """Record what is held in a step (``Ledger.note_blocks``)."""
        evicted = sum(live.num_evicted for live in self.groups)
        blocks = (num_table_blocks - evicted) / len(self.groups)
        record = self.record
        record["peak_blocks"] = max(record["peak_blocks"], blocks)
        record["peak_pool_blocks"] = max(record["peak_pool_blocks"], num_pool_blocks)
        self.steps += 1
        self.blocks_steps += blocks

    def final_record(self, block_size: int, min_blocks: int) -> dict[str, Any]:
        """The record of a request that ended (counts; blocks are a layer group's average).

        Of a request that ended before its first eviction, or whose policy failed, the effective
        sparsity is 0: its budget was not kept.
        """
        effective = self.settings.effective_sparsity(self.num_tokens, block_size, min_blocks)
        kept_to = self.record["blocks_evicted"] and "policy_error" not in self.record
        return {
            **self.record,
            "effective_sparsity": effective if kept_to else 0.0,
            "average_blocks": self.blocks_steps / self.steps if self.steps else 0.0,
            "num_steps": self.steps,
            "block_size": block_size,
            "preemptions": self.request.num_preemptions,
        }
