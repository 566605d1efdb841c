"""What an engine of several ranks keeps, and the mass of a request that loses nothing.

python -m tests.gpu.ranks MODEL RANKS OUTPUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from harness.study.settings import ALL_SCORES

from .mass import mass_by_step

POLICIES = ("streaming", "h2o", "cab")


def positions_in(worker: Any, block_ids: list[int]) -> list[list[list[int]]]:
    """Runs in a worker: the tokens that lie in blocks, by layer and KV head of its rank, sorted."""
    from vllm_plugins.attention.state import worker_state

    position = worker_state().tokens.position[:, block_ids]  # layers, blocks, heads, tokens
    return position.transpose(1, 2).flatten(2).sort(-1).values.tolist()


def kept_tokens(llm: Any, prompt: list[int], policy: str) -> list[list[list[int]]]:
    """Tokens in the region of a request that is alone, by layer and head of the whole model."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=8,  # the last chunk is packed a step or two later
        ignore_eos=True,
        detokenize=False,
        extra_args={"kv_policy": policy, "kv_sparsity": 0.7, "kv_granularity": "token"},
    )
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    region = output.kv_transfer_params["kv_eviction"]["trace"][-1]["region"]
    # Nobody came after it: its tokens still lie where they lay.
    by_rank = llm.collective_rpc(positions_in, args=(region,))
    return [[head for rank in layer for head in rank] for layer in zip(*by_rank, strict=True)]


def decisions(model: str, ranks: int, **engine_arguments: Any) -> dict[str, Any]:
    """Kept blocks of each decision by policy, kept tokens by policy, and the mass of a request
    that loses none."""
    from vllm import LLM, SamplingParams

    from vllm_plugins import eviction_engine_args

    llm = LLM(
        model,
        **{
            "tensor_parallel_size": ranks,
            "max_model_len": 4096,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 1024,
            "gpu_memory_utilization": 0.2,  # the other engine runs beside it
            "kv_cache_memory_bytes": 256 << 20,
            "skip_tokenizer_init": True,
            "seed": 0,
            **eviction_engine_args(
                block_size=16,
                policy="dense",
                prefix_caching=False,  # a hit has other scores
                check_integrity=True,
                trace_decisions=True,
                **ALL_SCORES,
            ),
            **engine_arguments,
        },
    )
    engine = llm.llm_engine
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 512, size=n).tolist() for n in (1900, 700, 3000)]
    made: dict[str, Any] = {}
    for policy in POLICIES:
        params = SamplingParams(
            max_tokens=1,
            detokenize=False,
            extra_args={"kv_policy": policy, "kv_sparsity": 0.7, "kv_granularity": "block"},
        )
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        made[policy] = [output.kv_transfer_params["kv_eviction"]["trace"] for output in outputs]
    made["by_token"] = {
        policy: [kept_tokens(llm, prompt, policy) for prompt in prompts] for policy in POLICIES
    }
    made["mass_per_query"] = list(mass_by_step(engine, prompts[1]))
    engine.engine_core.shutdown()
    return made


if __name__ == "__main__":
    folder, number, path = sys.argv[1:]
    Path(path).write_text(json.dumps(decisions(folder, int(number))))
