"""Nothing is compiled while requests wait, also of the first request of a new process."""

import json

import pytest

from ..child import child
from .engines import NEEDS_GPU

OFFERED = ("streaming", "cab", "random", "key_norm", "tova", "snapkv", "keydiff")
pytestmark = [*NEEDS_GPU, pytest.mark.usefixtures("no_engine")]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"policy": "cab"},
        {"granularity": "block", "score": "decay"},
        {"policy": "cab", "engine": {"kv_cache_dtype": "fp8"}},
        {"asked": [{"kv_policy": name} for name in OFFERED]},
        {"policy": "key_norm", "granularity": "block", "engine": {"kv_cache_dtype": "fp8"}},
    ],
    ids=["h2o", "cab", "blocks", "fp8", "asked", "fp8-key-norm"],
)
def test_no_kernel_is_compiled_after_the_start(settings, llama, tmp_path):
    output = tmp_path / "output.json"
    given = (llama, json.dumps(settings), str(output))
    with child("tests.gpu.compilations", *given) as process:
        assert process.wait(timeout=240) == 0
    made = json.loads(output.read_text())
    assert made["compiled"] == []
    assert sum(made["evicted"]) > 100
