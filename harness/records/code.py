"""Which sources a result depends on, and a fingerprint over them."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_HARNESS, _PLUGIN = "harness", "vllm_plugins"


def import_closure(modules: Iterable[str]) -> list[Path]:
    """Files of the harness that ``modules`` import, directly or not, themselves included.

    Imports inside functions count too: they are read from the source, nothing is imported.

    Args:
        modules: dotted names, like ``harness.measure.offline``.

    Returns:
        absolute paths, sorted.

    """
    found: set[Path] = set()
    waiting = [path for name in modules if (path := _file_of(name)) is not None]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _imported(path)
    return sorted(found)


def code_fingerprint(modules: Iterable[str]) -> str:
    """Sixteen hexadecimal digits over the plugin's sources and the closure of ``modules``."""
    digest = hashlib.sha256()
    for path in [*sorted((_ROOT / _PLUGIN).rglob("*.py")), *import_closure(modules)]:
        digest.update(str(path.relative_to(_ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _imported(path: Path) -> list[Path]:
    package = list(path.relative_to(_ROOT).parent.parts)
    names = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) + 1 - node.level], *filter(None, [node.module])]
            # ``from .x import y``: y is a module of x, or a name in it.
            names += [".".join([*base, alias.name]) for alias in node.names] + [".".join(base)]
    return [file for name in names if (file := _file_of(name)) is not None]


def _file_of(name: str) -> Path | None:
    if name.partition(".")[0] != _HARNESS:
        return None
    path = _ROOT.joinpath(*name.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file
    return None
