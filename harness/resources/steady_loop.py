"""A closed loop on an engine, measured in its steady state.

requests        P + age tokens each, as many as the pool holds       one new for each that ends
time            aged prompts are computed | settle_seconds | the window          | some steps
                                                           | measured, unwatched | watched
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..analysis.renewal import mean_live_tokens
from ..study.steady_load import SteadyLoad
from .steady_requests import DrawnRequest, draw_request

SUB_WINDOW_SECONDS = 5.0
"""About so long are the parts of a window whose rates are told."""
_FULL = 0.99
"""Share of the pool."""


@dataclass(frozen=True)
class Progress:
    """What a step brought a request."""

    number: int
    new_tokens: int
    ended: bool


@dataclass(frozen=True)
class Gauges:
    """What an engine holds after a step."""

    running: int
    kv_blocks_used: int


class SteadyEngine(Protocol):
    """What the loop needs of an engine (``steady_engine.py``)."""

    vocabulary: int
    kv_cache_tokens: int
    """The pool holds so many without eviction."""
    kv_blocks: int

    def add(self, number: int, request: DrawnRequest) -> None: ...
    def step(self) -> Sequence[Progress]: ...
    def gauges(self) -> Gauges: ...
    def counters(self) -> dict[str, Any]:
        """``preemptions``, ``decision_seconds`` and ``scoring_seconds`` by phase, so far."""

    def eviction(self) -> dict[str, Any] | None:
        """What was evicted, over the requests of this load that have ended."""

    def host(self, step: Callable[[], Any]) -> dict[str, float] | None:
        """What the host works at in some steps; None where nobody can tell."""

    def split(self, step: Callable[[], Any]) -> dict[str, float] | None:
        """Where the time of a few steps goes on the device; None where nobody can tell."""

    def stop(self) -> None:
        """End every request that is left."""


@dataclass(frozen=True)
class _Step:
    """A step of the window."""

    at: float
    """Seconds since the window began, at the step's end."""
    output_tokens: int
    gauges: Gauges


def num_aged(load: SteadyLoad, settings: dict[str, Any], kv_cache_tokens: int) -> int:
    """So many sequences start at an age: those that the pool holds at their mean live size."""
    live = mean_live_tokens(
        load.prompt_tokens,
        load.output_tokens,
        settings.get("kv_sparsity", 0.0),
        settings.get("kv_budget_tokens"),
    )
    return int(min(load.num_sequences, kv_cache_tokens // max(live, 1.0)))


def measure(
    load: SteadyLoad,
    seed: int,
    settings: dict[str, Any],
    engine: SteadyEngine,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Run a loop until its window is over.

    Args:
        load: its sequences.
        seed: of every draw.
        settings: of every request; its budget says how many sequences start at an age.
        engine: nothing runs on it; nothing does afterwards.
        clock: seconds.

    Returns:
        Of the window: ``seconds``, ``output_tokens``, ``steps``, ``ms_per_step``,
        ``tokens_per_step``, ``running`` and ``kv_blocks_used`` (means over its steps), and what
        ``SteadyEngine.counters`` gained; ``sub_windows``, output tokens per second in equal parts
        of it. Of the run: ``num_aged``, ``settling_seconds`` (all before the window),
        ``kv_blocks`` (the pool's), ``requests_ended``, ``eviction`` over these, ``host``,
        ``split``.

    """
    aged = num_aged(load, settings, engine.kv_cache_tokens)
    loop = _Loop(load, seed, aged, engine)
    started = clock()
    # Until this load is heard of, gauges may be those of the load before, which left a full pool.
    while loop.young and not (loop.answered and _is_full(engine)):
        loop.step()
    settled = clock() + load.settle_seconds
    while clock() < settled:
        loop.step()
    before, begun = engine.counters(), clock()
    steps: list[_Step] = []
    while not steps or steps[-1].at < load.measured_seconds:
        output_tokens = loop.step()
        steps.append(_Step(clock() - begun, output_tokens, engine.gauges()))
    after = engine.counters()
    host, split = engine.host(loop.step), engine.split(loop.step)
    engine.stop()
    return {
        **_figures(steps),
        **_gained(before, after),
        "num_aged": aged,
        "settling_seconds": begun - started,
        "kv_blocks": engine.kv_blocks,
        "requests_ended": loop.ended,
        "eviction": engine.eviction(),
        "host": host,
        "split": split,
    }


class _Loop:
    """The requests in an engine, each replaced as it ends."""

    def __init__(self, load: SteadyLoad, seed: int, aged: int, engine: SteadyEngine) -> None:
        self._load, self._seed, self._aged, self._engine = load, seed, aged, engine
        self._next = 0
        self.ended = 0
        self.answered = False
        """Whether a request of this loop has a token."""
        self.young = set(range(aged))
        """Aged sequences whose prompt is not computed yet."""
        for _ in range(load.num_sequences):
            self._add()

    def step(self) -> int:
        """One step of the engine; its output tokens."""
        output_tokens = 0
        for progress in self._engine.step():
            self.answered = True
            output_tokens += progress.new_tokens
            self.young.discard(progress.number)
            if progress.ended:
                self.ended += 1
                self._add()
        return output_tokens

    def _add(self) -> None:
        number, self._next = self._next, self._next + 1
        aged = number < self._aged
        drawn = draw_request(self._load, self._seed, number, aged, self._engine.vocabulary)
        self._engine.add(number, drawn)


def _is_full(engine: SteadyEngine) -> bool:
    """Whether aged sequences that still wait could wait long: for others to end, not for a step."""
    return engine.gauges().kv_blocks_used >= _FULL * engine.kv_blocks


def _figures(steps: Sequence[_Step]) -> dict[str, Any]:
    seconds = steps[-1].at
    parts = max(1, round(seconds / SUB_WINDOW_SECONDS))
    tokens = [0] * parts
    for step in steps:
        tokens[min(parts - 1, int(step.at / seconds * parts))] += step.output_tokens
    return {
        "seconds": seconds,
        "output_tokens": sum(tokens),
        "sub_windows": [count * parts / seconds for count in tokens],
        "steps": len(steps),
        "ms_per_step": 1e3 * seconds / len(steps),
        "tokens_per_step": sum(tokens) / len(steps),
        "running": sum(step.gauges.running for step in steps) / len(steps),
        "kv_blocks_used": sum(step.gauges.kv_blocks_used for step in steps) / len(steps),
    }


def _gained(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What counters gained, also those in a mapping."""
    return {
        name: _gained(before.get(name, {}), value)
        if isinstance(value, dict)
        else value - before.get(name, 0)
        for name, value in after.items()
    }
