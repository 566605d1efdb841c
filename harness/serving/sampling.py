"""Samples the server while the load runs: its metrics, and the memory of process and device."""

from __future__ import annotations

import asyncio
import shutil
import time
from typing import Any

import aiohttp
import psutil

from .scrape import parse_cache_config, parse_metrics

_TIMEOUT = aiohttp.ClientTimeout(total=5.0)


class Sampler:
    """Rows of samples on the run's clock; a scrape that fails is counted, never an error."""

    def __init__(self, base_url: str, interval_s: float, server_pid: int | None = None) -> None:
        self._url = base_url.rstrip("/") + "/metrics"
        self._interval_s = interval_s
        self._server_pid = server_pid
        self._device_mib: float | None = None
        self.rows: list[dict[str, float]] = []
        self.failed = 0
        self.cache_config: dict[str, int] = {}

    async def run(self, start: float) -> None:
        """Sample until cancelled; ``start`` is the run's zero on ``time.perf_counter``."""
        device = asyncio.ensure_future(self._watch_device())
        try:
            async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
                while True:
                    await self._sample(session, start)
                    # On a grid: a slow scrape does not shift those after it.
                    turn = int((time.perf_counter() - start) / self._interval_s) + 1
                    await asyncio.sleep(start + turn * self._interval_s - time.perf_counter())
        finally:
            device.cancel()

    async def finish(self, start: float) -> None:
        """One more sample, after the last request has ended: counters are complete then."""
        async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
            await self._sample(session, start)

    async def _sample(self, session: aiohttp.ClientSession, start: float) -> None:
        began = time.perf_counter()
        try:
            async with session.get(self._url) as response:
                response.raise_for_status()
                text = await response.text()
        except (aiohttp.ClientError, OSError, TimeoutError):
            self.failed += 1
            return
        # The server answered somewhere between the two.
        row = {"time_s": (began + time.perf_counter()) / 2 - start, **parse_metrics(text)}
        self.cache_config = self.cache_config or parse_cache_config(text)
        if self._server_pid is not None:
            row |= process_memory(self._server_pid)
        if self._device_mib is not None:
            row["device_memory_mib"] = self._device_mib
        self.rows.append(row)

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
        """``{name: values}``; a series that some rows lack holds 0 there only for counters.

        The plugin's counters (everything of it but its live share) by policy are absent from the
        page until first counted, so 0 is their value; any other gap ends the series at the rows
        that have it, which is then given as ``name`` with ``name_time_s`` of its own.
        """
        names = sorted({name for row in self.rows for name in row} - {"time_s"})
        columns: dict[str, Any] = {"time_s": [round(row["time_s"], 4) for row in self.rows]}
        for name in names:
            if name.startswith("kv_eviction_") and name != "kv_eviction_live_share":
                columns[name] = [round(row.get(name, 0.0), 6) for row in self.rows]
                continue
            having = [row for row in self.rows if name in row]
            columns[name] = [round(row[name], 6) for row in having]
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
