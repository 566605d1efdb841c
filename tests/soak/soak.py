"""Rounds of random traffic through one engine."""

from __future__ import annotations

import ctypes
import gc
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import pytest

from ..engine.conftest import TINY_BLOCK_BYTES
from ..engine.traffic import add, random_traffic
from .arrivals import WRONG, Arrivals
from .quiet import compare, is_comparable, record_of
from .watch import Watch

REQUESTS = 60
"""A round's."""
COMPARED = 8
"""So many of a round's answers at most."""


@dataclass(frozen=True)
class SoakedEngine:
    """Settings of an engine that is soaked.

    Attributes:
        name: what is special about it.
        engine: arguments of vLLM.
        settings: of the plug-in.
        whole_prompts: a prompt is computed in one step, however many others run.
        num_priorities: that requests have.

    """

    name: str
    engine: dict[str, Any]
    settings: dict[str, Any]
    whole_prompts: bool = False
    num_priorities: int = 1

    def arguments(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of ``make_tiny``: the pool is too small for what runs, and prefixes are shared."""
        pool = {"kv_cache_memory_bytes": 42 * TINY_BLOCK_BYTES}
        shared = {"prefix_caching": True, "granularity": "default", "trace_decisions": False}
        return {**pool, **self.engine}, {**shared, **self.settings}


ENGINES = (
    SoakedEngine(
        "whole prompts",
        # Eight requests of 1,024 tokens, and then no chunk.
        {"long_prefill_token_threshold": 1024, "max_num_batched_tokens": 8192},
        {},
        whole_prompts=True,
    ),
    SoakedEngine(
        "chunks by priority, two layer groups",
        {"scheduling_policy": "priority"},
        {"layer_groups": 2},
        num_priorities=3,
    ),
)


@dataclass
class Soak:
    """Traffic through a running engine that ``soaked`` describes.

    Attributes:
        counts: of everything so far.
        memory: seconds since the start and resident MiB, after each round.

    """

    llm: Any
    soaked: SoakedEngine
    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.watch = Watch(self.llm)
        self._started = time.monotonic()
        self._process = psutil.Process()

    def round(self) -> None:
        """One round; afterwards the engine is at rest.

        Raises:
            AssertionError: what does not hold.

        """
        number = self.counts["rounds"]
        rng = np.random.default_rng([self.seed, ENGINES.index(self.soaked), number])
        # So that a round depends on nothing but its seed.
        assert self.llm.reset_prefix_cache()
        outputs: dict[str, Any] = {}
        arrivals = Arrivals(rng, outputs, self.soaked.num_priorities)

        def next_request(place: int) -> dict[str, Any]:
            if rng.random() < 0.1:
                self._refuse(rng)
            return arrivals.draw(place)

        with self.watch.counting():
            random_traffic(self.llm, rng, REQUESTS, next_request, outputs, self.watch.check_tables)
        self.watch.rest()
        self._check_answers(arrivals.drawn, outputs)
        self._compare(rng, arrivals.drawn, outputs)
        self.watch.rest()
        self.counts["rounds"] += 1
        self._note_memory()

    def _refuse(self, rng: np.random.Generator) -> None:
        """Settings that are wrong are an error where the request is made."""
        from vllm.exceptions import VLLMValidationError

        extra, sentence = WRONG[rng.integers(len(WRONG))]
        with pytest.raises(VLLMValidationError, match=sentence):
            add(self.llm, "refused", [1, 2, 3], extra, 4)
        self.counts["refusals"] += 1

    def _check_answers(self, drawn: dict[str, Any], outputs: dict[str, Any]) -> None:
        """Everybody who was not aborted has as many tokens as asked for, and no policy failed."""
        for name, output in outputs.items():
            request = drawn[name]
            lengths = [len(sample.token_ids) for sample in output.outputs]
            assert lengths == [request["max_tokens"]] * request.get("n", 1), name
            record = record_of(output)
            assert not record.keys() & {"policy_error", "refused_settings"}, record
        self.counts["requests"] += len(drawn)
        self.counts["answered"] += len(outputs)
        self.counts["samples"] += sum(len(output.outputs) for output in outputs.values())
        self.counts["aborts"] += len(drawn) - len(outputs)

    def _compare(
        self, rng: np.random.Generator, drawn: dict[str, Any], outputs: dict[str, Any]
    ) -> None:
        able = [
            name
            for name, output in outputs.items()
            if is_comparable(drawn[name], output, self.soaked.whole_prompts)
        ]
        for name in rng.permutation(able)[:COMPARED]:
            compare(self.llm, drawn[name], outputs[name], self.counts)

    def _note_memory(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free, but not given back, is no leak
        resident = self._process.memory_info().rss / 2**20
        self.memory.append((time.monotonic() - self._started, resident))

    def memory_growth_mib(self) -> float:
        """MiB that were added between the second third of the rounds and the last, by medians."""
        resident = [mib for _, mib in self.memory]
        third = max(1, len(resident) // 3)
        return float(np.median(resident[-third:]) - np.median(resident[third:-third]))

    def report(self) -> dict[str, Any]:
        """Of everything so far, JSON values."""
        return {
            "engine": self.soaked.name,
            "seconds": round(time.monotonic() - self._started, 1),
            "ties": 0,
            **{name: self.counts[name] for name in sorted(self.counts)},
            **{name: self.watch.counts[name] for name in sorted(self.watch.counts)},
            "leaked_blocks": self.watch.leaked_blocks(),
            "memory_growth_mib": round(self.memory_growth_mib(), 2),
            "memory_seconds": [round(seconds, 1) for seconds, _ in self.memory],
            "memory_mib": [round(mib, 2) for _, mib in self.memory],
        }
