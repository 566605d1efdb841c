"""Where the time of one invocation of a sweep goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..records.provenance import timestamp


@dataclass
class Session:
    """Counts, and seconds by part, of one invocation."""

    started: str = field(default_factory=timestamp)
    clock: float = field(default_factory=time.perf_counter)
    parts: dict[str, float] = field(default_factory=dict)
    engine_starts: int = 0
    runs_done: int = 0
    runs_skipped: int = 0
    runs_failed: int = 0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block's time under ``name``, also where it fails."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - started

    def to_dict(self) -> dict[str, Any]:
        wall = time.perf_counter() - self.clock
        starts = self.parts.get("engine", 0.0) + self.parts.get("warm_up", 0.0)
        measuring = self.parts.get("measuring", 0.0)
        return {
            "started": self.started,
            "wall_seconds": round(wall, 3),
            "engine_starts": self.engine_starts,
            "engine_start_seconds": round(starts, 3),
            "measuring_seconds": round(measuring, 3),
            "harness_seconds": round(wall - starts - measuring, 3),
            "overhead_share": round(1 - measuring / wall, 4),
            "seconds_by_part": {name: round(value, 3) for name, value in self.parts.items()},
            "runs_done": self.runs_done,
            "runs_skipped": self.runs_skipped,
            "runs_failed": self.runs_failed,
        }
