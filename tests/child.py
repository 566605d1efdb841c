"""An engine in a process of its own: with several ranks, or beside another one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .conftest import ROOT


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
