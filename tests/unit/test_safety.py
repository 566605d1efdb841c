"""What a request sends is bounded, shown in short, and never becomes a file or an object."""

import ast
import json
import sys
from pathlib import Path

import pytest

import vllm_plugins
from vllm_plugins.config import EvictionConfig
from vllm_plugins.parsing import EvictionConfigError
from vllm_plugins.refusals.http import misplaced

SOURCES = sorted(Path(vllm_plugins.__file__).parent.rglob("*.py"))
DEEP = "[" * 900 + "]" * 900
HUGE = 10**400


@pytest.mark.parametrize(
    "extra",
    [
        {"kv_sparsity": HUGE},
        {"kv_sparsity": float("nan")},
        {"kv_sparsity": float("inf")},
        {"kv_sparsity": -0.1},
        {"kv_sparsity": "nan"},
        {"kv_sparsity": [0.5]},
        {"kv_budget_tokens": HUGE},
        {"kv_budget_tokens": 2**31},
        {"kv_budget_tokens": -64},
        {"kv_budget_tokens": float("nan")},
        {"kv_budget_tokens": "9" * 5000},
        {"kv_policy": "h2o" * 10_000},
        {"kv_policy": ["h2o"]},
        {"kv_granularity": "token" * 10_000},
        {"kv_policy_args": DEEP},
        {"kv_policy_args": "[" * 100_000},
        {"kv_policy_args": '{"recent": ' + DEEP + "}"},
        {"kv_policy_args": '{"recent": NaN}'},
        {"kv_policy_args": '{"recent": -Infinity}'},
        {"kv_policy_args": f'{{"recent": {HUGE}}}'},
        {"kv_policy_args": f'{{"recent": {"9" * 5000}}}'},
        {"kv_policy_args": '{"' + "x" * 100_000 + '": 1}'},
        {"kv_policy_args": {"selection": "head" * 10_000}},
        {"kv_policy": "snapkv", "kv_policy_args": {"window": HUGE}},
        {"kv_policy": "snapkv", "kv_policy_args": {"window": 2**31}},
        {"kv_policy": "snapkv", "kv_policy_args": {"window": -HUGE}},
        {"kv_policy": "snapkv", "kv_policy_args": {"pool": HUGE}},
        {"kv_policy": "cab", "kv_policy_args": {"bridge_definition": "b" * 100_000}},
        {"kv_" + "x" * 100_000: 1},
    ],
    ids=lambda extra: str(extra)[:50] if HUGE not in extra.values() else "a huge number",
)
def test_a_value_out_of_bounds_is_refused_in_a_short_sentence(extra):
    config = EvictionConfig(policy="h2o", sparsity=0.5)
    with pytest.raises(EvictionConfigError) as refusal:
        config.request_settings(extra, 32)
    assert len(str(refusal.value)) < 500


def test_the_largest_budget_is_taken():
    config = EvictionConfig(policy="h2o", sparsity=0.5)
    assert config.request_settings({"kv_budget_tokens": 2**31 - 1}, 32).keep(10, 32, 4) > 0


def test_a_misplaced_setting_of_any_length_is_told_in_short():
    for name in ("kv_policy", "sparsity"):
        sentence = misplaced(json.dumps({name: "y" * 100_000}).encode())
        assert sentence is not None
        assert len(sentence) < 300
    assert misplaced(("[" * 100_000).encode()) is None
    assert misplaced(b'{"sparsity": ' + DEEP.encode() + b"}") is not None


def test_the_deepest_json_that_is_read_can_be_shown():
    """Reading a value and writing it have limits of their own."""
    config = EvictionConfig(policy="h2o", sparsity=0.5)
    for depth in range(50, sys.getrecursionlimit() + 200, 50):
        text = '{"recent": ' + "[" * depth + "]" * depth + "}"
        with pytest.raises(EvictionConfigError):
            config.request_settings({"kv_policy_args": text}, 32)


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield (
                node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            )


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").partition(".")[0]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_plugin_opens_no_file_and_unpickles_nothing(source):
    """What a server's requests reach is all here; vLLM's own processes pickle for themselves."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    assert not {"pickle", "marshal", "shelve", "pathlib", "os", "subprocess"} & {*imports(tree)}
    forbidden = {"open", "eval", "exec", "__import__", "import_module"}
    assert not forbidden & {*calls(tree)}
