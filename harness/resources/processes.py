"""Child processes that leave nothing behind: a group of their own, ended whole, with a log."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

PATIENCE_S = 20.0
"""Between asking a process to end and killing it."""
_PDEATHSIG = 1  # prctl(2)
_ERROR_LINE = re.compile(r"\b(\w*(?:Error|Exception|Interrupt)): (.+)")


def start(
    command: Sequence[str], environment: Mapping[str, str], **streams: Any
) -> subprocess.Popen[bytes]:
    """Run ``command`` in a session of its own; ``end_group`` ends all of it.

    Should this process be killed outright, the kernel tells the child to end too (Linux).

    Args:
        command: with its arguments.
        environment: on top of this process's.
        streams: ``stdin``, ``stdout`` and ``stderr``, as ``subprocess.Popen`` takes them.

    """
    return subprocess.Popen(
        command,
        start_new_session=True,
        env={**os.environ, **environment},
        preexec_fn=_end_with_parent,
        **streams,
    )


def end_group(process: subprocess.Popen[bytes], patience_s: float) -> None:
    """End a session's leader and everything in it: asked first, then killed."""
    deadline = time.monotonic() + patience_s
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        while time.monotonic() < deadline and _group_alive(process):
            time.sleep(0.05)
        deadline = time.monotonic() + patience_s
        if not _group_alive(process):
            break
    process.wait()


def last_error(log: Path) -> str:
    """The most telling line of a log: the last that names an error, else the last at all.

    vLLM's parent process only says that its child failed; that is no answer.
    """
    try:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return "no log"
    found = [match for line in lines if (match := _ERROR_LINE.search(line))]
    telling = [match for match in found if "Engine core initialization failed" not in match[2]]
    if telling:
        return f"{telling[-1][1]}: {telling[-1][2]}"
    return lines[-1].strip() if lines else "an empty log"


def new_log(folder: Path, key: str) -> Path:
    """A name of its own for each start: the log of a dead process is evidence."""
    names = chain([f"{key}.log"], (f"{key}.{number}.log" for number in count(2)))
    return next(path for name in names if not (path := folder / name).exists())


def _group_alive(process: subprocess.Popen[bytes]) -> bool:
    process.poll()  # reap the leader: a zombie would keep the group alive
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def _end_with_parent() -> None:
    """In the child, before exec: SIGTERM when the starting process dies."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGTERM)
