"""Versions, hardware and code behind a record of the kvpress side."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

_PACKAGES = ("kvpress", "transformers", "torch", "numpy")
_MEASURING = ("run.py", "presses.py")
"""What a record's figures depend on."""
_FOLDER = Path(__file__).resolve().parent


def provenance(device: str) -> dict[str, Any]:
    """Of this process, in the form of this project's own records."""
    digest = hashlib.sha256()
    for name in _MEASURING:
        digest.update((_FOLDER / name).read_bytes())
    return {
        "versions": {"python": platform.python_version(), **{p: version(p) for p in _PACKAGES}},
        "hardware": _hardware(device),
        "commit": os.environ.get("KV_EVICTION_COMMIT") or _commit(),
        "code": digest.hexdigest()[:16],
    }


def timestamp() -> str:
    """Now, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _hardware(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "device": device,
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
    }
    if device == "cuda":
        import torch

        found |= {"gpu": torch.cuda.get_device_name(0), "cuda": torch.version.cuda}
    return found


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _commit() -> str | None:
    command = ["git", "-C", str(_FOLDER), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
