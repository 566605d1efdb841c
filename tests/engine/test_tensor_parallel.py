"""Two tensor-parallel ranks: each scores its own heads, the scheduler sees their sum."""

import json

import numpy as np

from ..child import child
from .ranks import decisions


def decided_by_two(model, output):
    with child(
        "tests.engine.ranks",
        model,
        "2",
        str(output),
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        OMP_NUM_THREADS="1",
    ) as process:
        assert process.wait(timeout=300) == 0
    return json.loads(output.read_text())


def test_two_ranks_decide_as_one(tiny_llama, tiny_engines, tmp_path):
    one = decisions(tiny_engines())
    two = decided_by_two(tiny_llama[0], tmp_path / "two.json")
    assert one.keys() == two.keys()
    for name in one:
        for (trace, tokens, log_probs), (trace_2, tokens_2, log_probs_2) in zip(
            one[name], two[name], strict=True
        ):
            assert bool(trace) == (name != "dense"), name
            assert trace_2 == trace, name
            assert tokens_2 == tokens, name
            np.testing.assert_allclose(log_probs_2, log_probs, atol=1e-4)
