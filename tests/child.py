"""Processes of tests: an engine in one of its own, and those that are left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from .conftest import ROOT


def children() -> list[psutil.Process]:
    """This process's that still run, but for multiprocessing's tracker, which stays once an engine
    started it. A zombie does not run: vLLM kills a core that ends too slowly and does not collect
    it (``vllm/v1/utils.py``, ``shutdown``)."""
    return [process for process in psutil.Process().children(recursive=True) if _runs(process)]


def _runs(process: psutil.Process) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return not any("multiprocessing.resource_tracker" in part for part in process.cmdline())
    except psutil.NoSuchProcess:  # a zombie since, or gone
        return False


@contextmanager
def child(module: str, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """``python -m module arguments``; it and its workers are gone afterwards, whatever happens."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
