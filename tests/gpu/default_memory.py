"""An engine as a user's first lines make it: no memory flag unless it is given here.

python -m tests.gpu.default_memory MODEL ENGINE SETTINGS FILL OUTPUT
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

NUM_EVICTING = 300
DENSE_TOKENS = 3000
DENSE_ANSWER = 100
"""Longer than all prompts take: the first requests still run when the last come."""


def run(model: str, engine: dict[str, Any], settings: dict[str, Any], fill: bool) -> dict[str, Any]:
    """What became of more requests than fit into one step, and of the memory.

    ``fill``: as many requests that keep all their tokens come along as fill the pool.
    """
    import numpy as np
    import torch
    from vllm import LLM, SamplingParams

    from vllm_plugins import eviction_engine_args

    began = time.perf_counter()
    llm = LLM(
        model,
        skip_tokenizer_init=True,
        **engine,
        **eviction_engine_args(block_size=16, check_integrity=True, **settings),
    )
    config = llm.llm_engine.vllm_config
    vocabulary = config.model_config.get_vocab_size()
    connector = llm.llm_engine.engine_core.engine_core.scheduler.connector
    num_blocks = connector._pool.num_gpu_blocks
    num_dense = int(1.1 * num_blocks * 16 / DENSE_TOKENS) + 1 if fill else 0
    rng = np.random.default_rng(0)
    dense = rng.permutation(NUM_EVICTING + num_dense) < num_dense
    prompts, params = [], []
    for keeps_all in dense:
        length = DENSE_TOKENS if keeps_all else 1500
        prompts.append({"prompt_token_ids": rng.integers(0, vocabulary, size=length).tolist()})
        params.append(
            SamplingParams(
                max_tokens=DENSE_ANSWER if keeps_all else 40,
                temperature=0.0,
                ignore_eos=True,
                detokenize=False,
                extra_args={"kv_policy": "dense"} if keeps_all else None,
            )
        )
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    ended = time.perf_counter()
    connector.check_integrity()
    free, total = torch.cuda.mem_get_info()
    records = [output.kv_transfer_params["kv_eviction"] for output in outputs]
    evicting = [i for i, keeps_all in enumerate(dense) if not keeps_all]
    result = {
        "answered": [len(output.outputs[0].token_ids) for output in outputs],
        "asked": [p.max_tokens for p in params],
        "evicted": [records[i]["blocks_evicted"] for i in evicting],
        "granularity": sorted({records[i]["granularity"] for i in evicting}),
        "peak_pool_share": max(r["peak_pool_blocks"] for r in records) / num_blocks,
        "preemptions": sum(r["preemptions"] for r in records),
        "policy_errors": [r["policy_error"] for r in records if "policy_error" in r],
        "idle_blocks": connector._pool.get_num_free_blocks(),
        "num_blocks": num_blocks,
        "groups": connector.ledger.num_groups,
        "seconds_to_start": started - began,
        "seconds_to_answer": ended - started,
        "memory_used": 1 - free / total,
        "cudagraph_mode": config.compilation_config.cudagraph_mode.name,
    }
    llm.llm_engine.engine_core.shutdown()
    return result


if __name__ == "__main__":
    folder, *given, path = sys.argv[1:]
    made = run(folder, *map(json.loads, given))
    Path(path).write_text(json.dumps(made))
    sys.stdout.flush()
    os._exit(0)  # the answer is written; an engine can stumble while the interpreter exits
