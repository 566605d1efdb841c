"""What an engine of several ranks decides, and the mass of a request that loses nothing.

python -m tests.gpu.ranks MODEL RANKS OUTPUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from harness.study.settings import ALL_SCORES

from .mass import mass_by_step


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
        gpu_memory_utilization=0.2,  # the other engine runs beside it
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


if __name__ == "__main__":
    folder, number, path = sys.argv[1:]
    Path(path).write_text(json.dumps(decisions(folder, int(number))))
