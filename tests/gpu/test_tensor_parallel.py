"""Two tensor-parallel ranks: each scores its own heads, the scheduler sees their sum."""

import json
from contextlib import ExitStack

import pytest
import torch

from ..child import child
from .models import make_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]
HEADS, LAYERS = 8, 4


def test_two_ranks_decide_as_one(tmp_path):
    model = make_llama(
        tmp_path / "llama",
        hidden_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=4,
    )
    outputs = {ranks: tmp_path / f"{ranks}.json" for ranks in (1, 2)}
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                child(
                    "tests.gpu.ranks",
                    model,
                    str(ranks),
                    str(output),
                    VLLM_WORKER_MULTIPROC_METHOD="spawn",
                )
            )
            for ranks, output in outputs.items()
        ]
        for process in processes:
            assert process.wait(timeout=300) == 0
    made = {ranks: json.loads(output.read_text()) for ranks, output in outputs.items()}
    for ranks in (1, 2):
        expected = HEADS * LAYERS  # a query spreads 1 per head and layer, whichever rank has it
        masses = made[ranks]["mass_per_query"]
        assert masses
        assert masses == pytest.approx([expected] * len(masses), rel=2e-3), ranks
    assert made[1]["streaming"] == made[2]["streaming"]
    for policy in ("h2o", "cab"):
        shared = total = 0
        for one, two in zip(made[1][policy], made[2][policy], strict=True):
            assert [e["tokens"] for e in one] == [e["tokens"] for e in two]
            for a, b in zip(one, two, strict=True):
                shared += len(set(a["kept"]) & set(b["kept"]))
                total += len(a["kept"])
        # Ranks round their sums differently in bfloat16, so blocks of like score may swap places.
        assert shared / total > 0.97, policy
