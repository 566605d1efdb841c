"""Everything the scheduler knows of one request between its admission and its end. No vLLM."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from .live_blocks import LiveBlocks
from .policies import BLOCK_SCORES, get_policy
from .request_settings import RequestSettings
from .request_table import RequestTable


class RequestLike(Protocol):
    """The part of ``vllm.v1.request.Request`` that decisions depend on."""

    request_id: str
    num_prompt_tokens: int
    num_computed_tokens: int

    @property
    def num_tokens(self) -> int: ...

    num_preemptions: int

    def is_finished(self) -> bool: ...


NEVER = sys.maxsize


@dataclass
class RequestState:
    """One request: what it follows, its live blocks by layer group, and its record.

    ``row``: its numbers in ``table``. ``due``: by layer group, the processed tokens below which
    the budget cannot be exceeded, so nothing has to be decided. ``num_adopted_tokens``: the first
    so many came from the prefix cache.
    """

    request: RequestLike
    settings: RequestSettings
    seed: int
    table: RequestTable
    row: int
    groups: list[LiveBlocks]
    due: list[int]
    num_adopted_tokens: int = 0
    record: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        request: RequestLike,
        settings: RequestSettings,
        seed: int,
        table: RequestTable,
        num_groups: int,
    ) -> RequestState:
        """The state of a request that has just arrived."""
        groups = [LiveBlocks() for _ in range(num_groups)]
        due = [0 if settings.evicts else NEVER] * num_groups
        row = table.add(settings.evicts, bool(settings.needs & BLOCK_SCORES))
        state = cls(request, settings, seed, table, row, groups, due)
        state.record = {
            "policy": settings.policy,
            "granularity": settings.granularity,
            "sparsity": settings.sparsity,
            "budget_tokens": settings.budget_tokens,
            "blocks_evicted": 0,
            "decisions": 0,
            "decisions_deferred": 0,
            "decision_seconds": 0.0,
            "first_eviction_tokens": None,
            "cached_tokens": 0,
        }
        return state

    @property
    def num_tokens(self) -> int:
        """Tokens that a relative budget is a share of: the whole prompt counts from the start."""
        return max(self.request.num_prompt_tokens, self.request.num_tokens)

    @property
    def num_scored_tokens(self) -> int:
        """Tokens that the newest reported scores include."""
        return int(self.table.scored[self.row])

    def restart(self) -> None:
        """Forget what died with the blocks of a preempted request."""
        self.groups = [LiveBlocks() for _ in self.groups]
        self.due = [0 if due != NEVER else NEVER for due in self.due]
        self.num_adopted_tokens = 0
        self.table.restart(self.row)

    def fail(self, reason: str, holds_budget: bool) -> None:
        """The policy could not be followed: nothing more is decided.

        Where memory is planned by the budget (``holds_budget``), the most recent tokens stay.
        """
        self.record["policy_error"] = reason
        if holds_budget:
            arguments = get_policy("streaming").resolve()
            self.settings = replace(self.settings, policy="streaming", policy_args=arguments)
            self.due = [0] * len(self.due)
        else:
            self.due = [NEVER] * len(self.due)

    def note_decision(self, group: int, num_tokens: int, num_evicted: int, seconds: float) -> None:
        """Record a decision over the first ``num_tokens`` tokens of ``group``."""
        record = self.record
        record["decisions"] += 1
        record["decision_seconds"] += seconds
        record["blocks_evicted"] += num_evicted
        self.table.evicted[self.row] += num_evicted
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

    def final_record(self, block_size: int, min_blocks: int) -> dict[str, Any]:
        """The record of a request that ended (counts; blocks are a layer group's average).

        Of a request that ended before its first eviction, or whose policy failed, the effective
        sparsity is 0: its budget was not kept.
        """
        effective = self.settings.effective_sparsity(self.num_tokens, block_size, min_blocks)
        table, row, groups = self.table, self.row, len(self.groups)
        steps = int(table.steps[row])
        kept_to = self.record["blocks_evicted"] and "policy_error" not in self.record
        return {
            **self.record,
            "effective_sparsity": effective if kept_to else 0.0,
            "peak_blocks": int(table.peak_blocks[row]) / groups,
            "peak_pool_blocks": int(table.peak_pool[row]),
            "average_blocks": int(table.block_steps[row]) / groups / steps if steps else 0.0,
            "num_steps": steps,
            "block_size": block_size,
            "preemptions": self.request.num_preemptions,
        }
