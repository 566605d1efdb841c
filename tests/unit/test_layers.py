"""Data flows one way: a folder of the harness imports from folders below it only."""

import ast
from pathlib import Path

import pytest

HARNESS = Path(__file__).resolve().parents[2] / "harness"
LAYERS = (
    "errors",
    "records",
    "inputs",
    "client",
    "study",
    "analysis",
    "resources",
    "measure",
    "sweep",
    "report",
    "bench",
    "commands",
    "cli",
    "__main__",
)
"""From the bottom up."""
MODULES = sorted(HARNESS.rglob("*.py"))


def layer(path):
    return path.relative_to(HARNESS).parts[0].removesuffix(".py")


def imported(path):
    """(first name, whole name) of each import, also of those inside functions."""
    package = ["harness", *path.relative_to(HARNESS).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0], node.module
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) + 1 - node.level], *filter(None, [node.module])]
            names = [base] if len(base) > 1 else [[*base, a.name] for a in node.names]
            yield from (("harness", ".".join(name)) for name in names)


def test_every_folder_has_its_layer():
    assert {layer(path) for path in MODULES} - {"__init__"} == set(LAYERS)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(HARNESS)))
def test_no_import_runs_upward(path):
    if layer(path) == "__init__":
        return
    height = LAYERS.index(layer(path))
    for top, name in imported(path):
        if top == "harness":
            assert LAYERS.index(name.split(".")[1]) <= height, name


def test_only_resources_and_benchmarks_know_vllm():
    """But for the NVML binding that vLLM carries."""
    knowing = {
        layer(path)
        for path in MODULES
        for top, name in imported(path)
        if top == "vllm" and name != "vllm.third_party"
    }
    assert knowing <= {"resources", "bench"}


def test_reports_compute_no_statistic():
    computing = {"statistics", "scipy.stats", "harness.analysis.statistics"}
    for path in MODULES:
        if layer(path) == "report":
            assert not computing & {name for _, name in imported(path)}, path
