"""results/robustness.md names tests that exist, one at least in each row."""

import ast
import re

from ..conftest import ROOT

TABLE = ROOT / "results" / "robustness.md"
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def rows():
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    return [line for line in lines if not line.startswith("| case ")]


def functions_of(path):
    nodes = ast.parse((ROOT / path).read_text()).body
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def test_every_row_names_tests_that_exist():
    assert len(rows()) > 30
    for row in rows():
        assert row.count(" | ") == 2, f"not three cells: {row}"
        named = NAMED.findall(row)
        assert named, f"no test is named: {row}"
        assert len(named) == row.count("tests/"), f"a test is not named as file::test: {row}"
        for path, name in named:
            assert name in functions_of(path), f"{path} has no {name}"
