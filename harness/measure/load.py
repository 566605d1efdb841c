"""One load against one running server: plan, send, sample, record."""

from __future__ import annotations

import asyncio
import gc
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from ..client.client import Client, encode
from ..client.load_plan import Plan
from ..client.load_settings import LoadSpecification
from ..client.loops import LoadLoop
from ..client.result import SUCCEEDED, Result
from ..client.sampling import Sampler
from ..client.target import Target
from .load_record import load_record

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Outcome:
    """A load's record, and why it ended early (None: it did not)."""

    record: dict[str, Any]
    stop_reason: str | None
    interrupted: bool = False


def run_load(
    specification: LoadSpecification,
    plan: Plan,
    target: Target,
    *,
    server_pid: int | None = None,
    watch: Callable[[], str | None] = lambda: None,
    progress: bool = True,
    api_key: str | None = None,
) -> Outcome:
    """Run a load and give its record, whatever happened to server or user meanwhile.

    Args:
        specification: of the load.
        plan: made from it.
        target: the server.
        server_pid: of a local server, to sample the memory of its processes.
        watch: asked every quarter of a second; a string ends the run with that reason.
        progress: show a bar.
        api_key: bearer token.

    """
    import uvloop

    _allow_files()
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(
                _run(specification, plan, target, server_pid, watch, progress, api_key)
            )
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


async def _run(
    s: LoadSpecification,
    plan: Plan,
    target: Target,
    server_pid: int | None,
    watch: Callable[[], str | None],
    progress: bool,
    api_key: str | None,
) -> Outcome:
    bodies = [encode(request, target.model, s.settings) for request in plan.requests]
    client = Client(target.base_url, s.timeout_s, api_key)
    sampler = Sampler(target.base_url, s.sample_interval_s, server_pid, api_key)
    with _Progress(len(plan.requests), progress) as bar:
        loop = LoadLoop(
            client, target.base_url, plan.requests, bodies, bar.ended, bar.sent, api_key
        )
        interrupted = _stop_on_signals(loop)
        gc.collect()
        gc.freeze()  # the plan is never garbage: no collection walks it during the run
        started_at, start = time.time(), time.perf_counter()
        beside = [
            asyncio.ensure_future(task)
            for task in (sampler.run(start), _watch(loop, watch), bar.keep_fresh())
        ]
        try:
            results = await loop.run(start, s.max_concurrency)
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            await client.close()
            gc.unfreeze()
        if loop.stop_reason is None:
            await sampler.finish(start)
    record = load_record(s, plan, target, results, sampler, started_at, loop.stop_reason)
    return Outcome(record, loop.stop_reason, bool(interrupted))


def _allow_files() -> None:
    """Each request in flight has a connection of its own: the usual 1,024 files are too few."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _stop_on_signals(loop: LoadLoop) -> list[int]:
    """Ctrl-C and termination end the run in order; the list tells afterwards."""
    seen: list[int] = []

    def stop(number: int) -> None:
        seen.append(number)
        loop.stop("interrupted")

    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    return seen


async def _watch(loop: LoadLoop, watch: Callable[[], str | None]) -> None:
    while True:
        if reason := watch():
            loop.stop(reason)
        await asyncio.sleep(0.25)


class _Progress:
    """A live line: how many ended, run, failed, and output tokens per second so far."""

    def __init__(self, total: int, shown: bool) -> None:
        self._bar = tqdm(total=total, unit="request", disable=not shown, dynamic_ncols=True)
        self._sent = self._ended = self._failed = self._tokens = 0
        self._counted = True
        self._started = time.perf_counter()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._refresh()
        self._bar.close()

    def sent(self) -> None:
        self._sent += 1

    def ended(self, result: Result) -> None:
        self._ended += 1
        self._failed += result.status != SUCCEEDED
        self._tokens += result.output_tokens or 0
        self._counted = self._counted and result.output_tokens is not None

    async def keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            self._refresh()

    def _refresh(self) -> None:
        seconds = max(1e-9, time.perf_counter() - self._started)
        speed = f"{self._tokens / seconds:.0f}" if self._counted else "?"
        self._bar.set_postfix_str(
            f"{self._sent - self._ended} in flight, {self._failed} failed, {speed} tok/s",
            refresh=False,
        )
        self._bar.update(self._ended - self._bar.n)
