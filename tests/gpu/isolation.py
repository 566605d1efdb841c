"""What watched requests answer while their neighbours keep their caches, and while they lose them.

python -m tests.gpu.isolation MODEL EAGER OUTPUT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

NUM_WATCHED = 12
KEPT = {"kv_policy": "h2o", "kv_budget_tokens": 10**7}
LOST = {"kv_policy": "h2o", "kv_sparsity": 0.9}


def both_runs(model: str, enforce_eager: bool) -> list[dict[str, Any]]:
    """Tokens of the watched requests and blocks evicted, neighbours keeping and losing theirs."""
    from vllm import LLM

    from vllm_plugins import eviction_engine_args

    llm = LLM(
        model,
        max_model_len=2048,
        max_num_seqs=32,
        max_num_batched_tokens=1024,
        gpu_memory_utilization=0.2,  # other engines may run beside it
        kv_cache_memory_bytes=1 << 30,  # nobody waits for memory: the batches are the same
        skip_tokenizer_init=True,
        enforce_eager=enforce_eager,
        seed=0,
        # The second run has the same prompts: hits would change its batches, and thus rounding.
        **eviction_engine_args(
            block_size=16, policy="dense", check_integrity=True, prefix_caching=False
        ),
    )
    made = [_run(llm.llm_engine, neighbours) for neighbours in (KEPT, LOST)]
    llm.llm_engine.engine_core.shutdown()
    return made


def _run(engine: Any, neighbours: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams

    rng = np.random.default_rng(11)
    watched, evicted, arrived, running = {}, 0, 0, {}
    while arrived < 5 * NUM_WATCHED or engine.has_unfinished_requests():
        if arrived < 5 * NUM_WATCHED and rng.random() < 0.9:
            watch = arrived % 5 == 0
            params = SamplingParams(
                max_tokens=int(rng.integers(50, 300)),
                temperature=0.0,
                ignore_eos=True,
                detokenize=False,
                extra_args={} if watch else neighbours,
            )
            prompt = rng.integers(0, 512, size=int(rng.integers(1, 1500))).tolist()
            name = f"{'watched' if watch else 'neighbour'}-{arrived}"
            internal = engine.add_request(name, {"prompt_token_ids": prompt}, params)
            if not watch:
                running[name] = internal
            arrived += 1
        if running and rng.random() < 0.02:
            engine.abort_request([running.pop(sorted(running)[0])], internal=True)
        for output in engine.step():
            if output.finished:
                running.pop(output.request_id, None)
                record = output.kv_transfer_params["kv_eviction"]
                assert record["preemptions"] == 0
                evicted += record["blocks_evicted"]
                if output.request_id.startswith("watched"):
                    watched[output.request_id] = list(output.outputs[0].token_ids)
    return {"watched": watched, "evicted": evicted}


if __name__ == "__main__":
    folder, eager, path = sys.argv[1:]
    Path(path).write_text(json.dumps(both_runs(folder, eager == "eager")))
    sys.stdout.flush()
    os._exit(0)  # the answer is written; an engine can stumble while the interpreter exits
