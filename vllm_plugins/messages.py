"""The two messages of a step, carried by official fields of vLLM's KV connector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from .packs import Pack
from .prefix_sharing import Takeover


@dataclass
class EvictionPlan(KVConnectorMetadata):
    """Scheduler to workers, with every step.

    Attributes:
        step: number of the step, echoed by the report.
        evicted: ``{request_id: {group: [position, ...]}}``; these entries of the group's block
            table are null from this step on.
        needs: what to gather for requests seen for the first time or again after preemption
            (see ``policies.base``); requests that need nothing are not listed.
        windows: of those, the ones whose rule has a window (``TokenRule.window``).
        started: requests whose tables begin anew with this step, and how many blocks of them are
            null by layer group, those in ``evicted`` aside.
        num_groups: layer groups.
        takeovers: by request, what the prefix cache asks for.
        packs: by request, in the order they were planned, what is packed before this step's nulls
            are written.

    """

    step: int = 0
    evicted: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    needs: dict[str, frozenset[str]] = field(default_factory=dict)
    windows: dict[str, int] = field(default_factory=dict)
    started: dict[str, list[int]] = field(default_factory=dict)
    num_groups: int = 1
    takeovers: dict[str, Takeover] = field(default_factory=dict)
    packs: dict[str, list[Pack]] = field(default_factory=dict)


@dataclass
class ScoreReport(KVConnectorWorkerMetadata):
    """Workers to scheduler, with every step's output.

    Attributes:
        step: newest step the scores include.
        scores: channel (``policies.ATTENTION``, ``policies.KEY_NORM``) to float32
            ``[num_blocks]``, one number per physical block; or a function that gives this once
            the copy from the GPU has arrived (``resolve``).
        graph: (request id, group, querying block, key blocks, mass) of this step.
        scoring_seconds: time this step spent on scores, by phase.
        pack_failures: request to the reason why its policy's ranking could not be followed.

    """

    step: int
    scores: dict[str, np.ndarray] | Callable[[], dict[str, np.ndarray]]
    graph: list[tuple[str, int, int, np.ndarray, np.ndarray]] = field(default_factory=list)
    scoring_seconds: dict[str, float] = field(default_factory=dict)
    pack_failures: dict[str, str] = field(default_factory=dict)

    def resolve(self) -> dict[str, np.ndarray]:
        """The scores, waiting for a copy that is under way.

        Called when the step's sampled tokens are on the host: the copy was enqueued right behind
        them, so there is next to nothing to wait for, and which scores a decision sees depends on
        the order of steps, never on timing.
        """
        if callable(self.scores):
            self.scores = self.scores()
        return self.scores

    def __getstate__(self) -> dict[str, object]:
        self.resolve()  # a message to another process carries numbers
        return self.__dict__

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Sum over tensor-parallel ranks, each of which saw its own heads."""
        assert isinstance(other, ScoreReport)
        assert other.step == self.step
        mine, others = self.resolve(), other.resolve()
        return ScoreReport(
            step=self.step,
            scores={name: mine[name] + others[name] for name in mine},
            graph=self.graph + other.graph,
            scoring_seconds=max(
                self.scoring_seconds, other.scoring_seconds, key=lambda s: sum(s.values())
            ),
            pack_failures={**self.pack_failures, **other.pack_failures},
        )
