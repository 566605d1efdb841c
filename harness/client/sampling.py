"""Samples the server while the load runs: its metrics, and the memory of process and device."""

from __future__ import annotations

import asyncio
import shutil
import time
from typing import Any

import aiohttp
import psutil

from .scrape import parse_cache_config, parse_metrics
from .target import authorization

_TIMEOUT = aiohttp.ClientTimeout(total=5.0)
_LINE_LIMIT = 200
_BY_POLICY = "kv_eviction_requests:"


class Sampler:
    """Rows of samples on the run's clock. What cannot be read is counted, never an error."""

    def __init__(
        self,
        base_url: str,
        interval_s: float,
        server_pid: int | None = None,
        api_key: str | None = None,
    ) -> None:
        self._url = base_url.rstrip("/") + "/metrics"
        self._interval_s = interval_s
        self._server_pid = server_pid
        self._headers = authorization(api_key)
        self._device_mib: float | None = None
        self._failed = 0
        self._failure = ""
        self._ended: str | None = None
        self._malformed: list[str] = []
        self.rows: list[dict[str, float]] = []
        self.cache_config: dict[str, int] = {}

    async def run(self, start: float) -> None:
        """Sample until cancelled; ``start`` is the run's zero on ``time.perf_counter``."""
        device = asyncio.ensure_future(self._watch_device())
        try:
            async with self._session() as session:
                while True:
                    await self._sample(session, start)
                    # On a grid: a slow scrape does not shift those after it.
                    turn = int((time.perf_counter() - start) / self._interval_s) + 1
                    await asyncio.sleep(start + turn * self._interval_s - time.perf_counter())
        except Exception as error:  # the load is worth more than its samples
            self._ended = f"{type(error).__name__}: {error}"
        finally:
            device.cancel()

    async def finish(self, start: float) -> None:
        """One more sample, after the last request has ended: counters are complete then."""
        async with self._session() as session:
            await self._sample(session, start)

    def warnings(self) -> list[str]:
        """What the samples lack, one sentence each."""
        found = []
        if self._ended:
            found.append(f"sampling ended before the run did ({self._ended})")
        if self._failed:
            found.append(
                f"{self._failed} samples of /metrics failed and are missing "
                f"(the last: {self._failure})"
            )
        if self._malformed:
            found.append(
                f"{len(self._malformed)} lines of /metrics, over all samples, could not be read "
                f"as finite numbers and are missing; the first: {self._malformed[0][:_LINE_LIMIT]}"
            )
        return found

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(timeout=_TIMEOUT, headers=self._headers)

    async def _sample(self, session: aiohttp.ClientSession, start: float) -> None:
        began = time.perf_counter()
        try:
            async with session.get(self._url) as response:
                response.raise_for_status()
                text = await response.text(errors="replace")
        except aiohttp.ClientResponseError as error:
            self._fail(f"HTTP {error.status}")
            return
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self._fail(str(error) or type(error).__name__)
            return
        # The server answered somewhere between the two.
        values = parse_metrics(text, self._malformed.append)
        row = {"time_s": (began + time.perf_counter()) / 2 - start, **values}
        self.cache_config = self.cache_config or parse_cache_config(text)
        if self._server_pid is not None:
            row |= process_memory(self._server_pid)
        if self._device_mib is not None:
            row["device_memory_mib"] = self._device_mib
        self.rows.append(row)

    def _fail(self, reason: str) -> None:
        self._failed += 1
        self._failure = reason

    async def _watch_device(self) -> None:
        """The newest reading of ``nvidia-smi``, where there is one, over all visible devices."""
        if shutil.which("nvidia-smi") is None:
            return
        while True:
            process = await asyncio.create_subprocess_exec(
                "nvidia-smi",
                "--query-gpu=memory.used",
                "--format=csv,noheader,nounits",
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
            )
            output, _ = await process.communicate()
            values = [line for line in output.decode().split() if line.isdigit()]
            if process.returncode or not values:
                return
            self._device_mib = float(sum(map(int, values)))
            await asyncio.sleep(self._interval_s)

    def columns(self) -> dict[str, Any]:
        """``{name: values}``; a series that some rows lack has a ``name_time_s`` of its own.

        The plugin's counters by policy are absent from the page until first counted: up to there
        their value is 0.
        """
        names = sorted({name for row in self.rows for name in row} - {"time_s"})
        columns: dict[str, Any] = {"time_s": [round(row["time_s"], 4) for row in self.rows]}
        for name in names:
            first = next(i for i, row in enumerate(self.rows) if name in row)
            counted = self.rows[:first] if name.startswith(_BY_POLICY) else []
            having = [*counted, *(row for row in self.rows[first:] if name in row)]
            columns[name] = [round(row.get(name, 0.0), 6) for row in having]
            if len(having) < len(self.rows):
                columns[f"{name}_time_s"] = [round(row["time_s"], 4) for row in having]
        return columns


def process_memory(pid: int) -> dict[str, float]:
    """Resident memory of a process and its descendants, MiB; nothing if it is gone.

    Pages that processes share count once for each.
    """
    try:
        root = psutil.Process(pid)
        members = [root, *root.children(recursive=True)]
    except psutil.Error:
        return {}
    total = 0
    for process in members:
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue
    return {"process_memory_mib": total / 2**20}
