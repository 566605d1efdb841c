"""Open and closed loop: who is sent when, and an end that always comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

import aiohttp

from .client import Client
from .load_plan import PlannedRequest
from .result import Result
from .target import authorization

_SPIN_S = 0.0015
"""Timers of event loops are good to a millisecond; the last stretch is polled."""
_CONNECTION_ERRORS = ("connection_refused", "connection_closed", "connection_failed")
_PROBES = 3
_PROBE_GAP_S = 0.3
_PROBE_TIMEOUT = aiohttp.ClientTimeout(total=10.0)


class LoadLoop:
    """One pass over a plan.

    ``stop(reason)`` ends it at once: what is in flight is cancelled and counted, what was not
    sent is counted as such. It stops itself when the server is gone.
    """

    def __init__(
        self,
        client: Client,
        base_url: str,
        requests: Sequence[PlannedRequest],
        bodies: Sequence[bytes],
        on_result: Callable[[Result], None] = lambda result: None,
        on_sent: Callable[[], None] = lambda: None,
        api_key: str | None = None,
    ) -> None:
        self._client, self._base_url = client, base_url.rstrip("/")
        self._api_key = api_key
        self._requests, self._bodies = requests, bodies
        self._on_result, self._on_sent = on_result, on_sent
        self._tasks: set[asyncio.Task[None]] = set()
        self._probing: asyncio.Task[None] | None = None
        self._stopped = asyncio.Event()
        self._start = 0.0
        self.results: list[Result] = []
        self.stop_reason: str | None = None

    def stop(self, reason: str) -> None:
        """End the run; the first reason stands."""
        if self.stop_reason is None:
            self.stop_reason = reason
            self._stopped.set()

    async def run(self, start: float, max_concurrency: int | None = None) -> list[Result]:
        """All results by index; ``start`` is the run's zero on ``time.perf_counter``."""
        self._start = start
        loop = self._closed(max_concurrency) if max_concurrency else self._open()
        work = asyncio.ensure_future(self._to_the_end(loop))
        stopped = asyncio.ensure_future(self._stopped.wait())
        await asyncio.wait((work, stopped), return_when=asyncio.FIRST_COMPLETED)
        for task in (work, stopped, *self._tasks, *filter(None, [self._probing])):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if work.done() and not work.cancelled():
            work.result()
        seen = {result.index for result in self.results}
        self.results += [
            Result(r.index, r.kind, r.send_at, window=r.window)
            for r in self._requests
            if r.index not in seen
        ]
        return sorted(self.results, key=lambda result: result.index)

    async def _to_the_end(self, loop: Awaitable[None]) -> None:
        await loop
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _open(self) -> None:
        for request in self._requests:
            assert request.send_at is not None
            # One turn of the event loop each, also when late: answers must not wait for sends.
            await asyncio.sleep(0)
            while (left := self._start + request.send_at - time.perf_counter()) > 0:
                await asyncio.sleep(left - _SPIN_S if left > _SPIN_S else 0)
            self._launch(request)

    async def _closed(self, max_concurrency: int) -> None:
        for request in self._requests:
            while len(self._tasks) >= max_concurrency:
                await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            self._launch(request)

    def _launch(self, request: PlannedRequest) -> None:
        self._on_sent()
        task = asyncio.ensure_future(self._send(request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send(self, request: PlannedRequest) -> None:
        result = await self._client.send(request, self._bodies[request.index], self._start)
        self.results.append(result)
        self._on_result(result)
        suspicious = result.error in _CONNECTION_ERRORS or (result.error or "").startswith("http_5")
        if suspicious and self._probing is None:
            self._probing = asyncio.ensure_future(self._probe())

    async def _probe(self) -> None:
        """Stop the run if the server does not answer any more."""
        for attempt in range(_PROBES):
            if attempt:
                await asyncio.sleep(_PROBE_GAP_S)
            reason = await unhealthy(self._base_url, self._api_key)
            if reason is None:
                self._probing = None
                return
        self.stop(f"the server at {self._base_url} is gone ({reason})")


async def unhealthy(base_url: str, api_key: str | None = None) -> str | None:
    """Why ``/health`` says the server cannot serve, or None. A slow answer is no reason."""
    try:
        async with (
            aiohttp.ClientSession(
                timeout=_PROBE_TIMEOUT, headers=authorization(api_key)
            ) as session,
            session.get(f"{base_url.rstrip('/')}/health") as response,
        ):
            return f"/health says {response.status}" if response.status >= 500 else None
    except TimeoutError:
        return None
    except (aiohttp.ClientError, OSError) as error:
        return str(error) or type(error).__name__
