"""Two tensor-parallel ranks: each scores its own heads, the scheduler sees their sum."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.study import ALL_SCORES

from .mass import mass_by_step
from .models import make_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]
HEADS, LAYERS = 8, 4


def decisions(model: str, ranks: int) -> dict[str, object]:
    """Kept blocks of each decision by policy, and the mass of a request that loses none."""
    from vllm import LLM, SamplingParams

    from vllm_plugins import eviction_engine_args

    llm = LLM(
        model,
        tensor_parallel_size=ranks,
        max_model_len=4096,
        max_num_seqs=16,
        max_num_batched_tokens=1024,
        gpu_memory_utilization=0.2,  # other engines may run beside it
        kv_cache_memory_bytes=256 << 20,
        skip_tokenizer_init=True,
        seed=0,
        **eviction_engine_args(
            block_size=16,
            policy="dense",
            check_integrity=True,
            trace_decisions=True,
            **ALL_SCORES,
        ),
    )
    engine = llm.llm_engine
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 512, size=n).tolist() for n in (1900, 700, 3000)]
    made = {}
    for policy in ("streaming", "h2o", "cab"):
        params = SamplingParams(
            max_tokens=1,
            detokenize=False,
            extra_args={"kv_policy": policy, "kv_sparsity": 0.7},
        )
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        made[policy] = [output.kv_transfer_params["kv_eviction"]["trace"] for output in outputs]
    made["mass_per_query"] = list(mass_by_step(engine, prompts[1]))
    engine.engine_core.shutdown()
    return made


def test_two_ranks_decide_as_one(tmp_path):
    model = make_llama(
        tmp_path / "llama",
        hidden_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=4,
    )
    made = {}
    for ranks in (1, 2):
        output = tmp_path / f"{ranks}.json"
        child = f"""
import json, pathlib
from tests.gpu.test_tensor_parallel import decisions
if __name__ == "__main__":
    pathlib.Path({str(output)!r}).write_text(json.dumps(decisions({model!r}, {ranks})))
"""
        script = tmp_path / "child.py"
        script.write_text(child)
        root = Path(__file__).resolve().parents[2]
        path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        subprocess.run(
            [sys.executable, str(script)],
            check=True,
            cwd=root,
            env={**os.environ, "PYTHONPATH": path, "VLLM_WORKER_MULTIPROC_METHOD": "spawn"},
            timeout=300,
        )
        made[ranks] = json.loads(output.read_text())
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
