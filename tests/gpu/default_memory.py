"""An engine as a user's first lines make it: no memory flag unless it is given here.

python -m tests.gpu.default_memory MODEL ENGINE SETTINGS OUTPUT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def run(model: str, engine: dict[str, object], settings: dict[str, object]) -> dict[str, object]:
    """What became of more requests than fit into one step, and of the memory."""
    import numpy as np
    import torch
    from vllm import LLM, SamplingParams

    from vllm_plugins import eviction_engine_args

    llm = LLM(
        model,
        skip_tokenizer_init=True,
        **engine,
        **eviction_engine_args(block_size=16, check_integrity=True, **settings),
    )
    config = llm.llm_engine.vllm_config
    vocabulary = config.model_config.get_vocab_size()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, vocabulary, size=1500).tolist() for _ in range(300)]
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    connector = llm.llm_engine.engine_core.engine_core.scheduler.connector
    connector.check_integrity()
    free, total = torch.cuda.mem_get_info()
    result = {
        "tokens": [len(output.outputs[0].token_ids) for output in outputs],
        "evicted": [
            output.kv_transfer_params["kv_eviction"]["blocks_evicted"] for output in outputs
        ],
        "idle_blocks": connector._pool.get_num_free_blocks(),
        "num_blocks": connector._pool.num_gpu_blocks,
        "groups": connector.ledger.num_groups,
        "memory_used": 1 - free / total,
        "cudagraph_mode": config.compilation_config.cudagraph_mode.name,
    }
    llm.llm_engine.engine_core.shutdown()
    return result


if __name__ == "__main__":
    folder, engine_arguments, eviction_settings, path = sys.argv[1:]
    made = run(folder, json.loads(engine_arguments), json.loads(eviction_settings))
    Path(path).write_text(json.dumps(made))
    sys.stdout.flush()
    os._exit(0)  # the answer is written; an engine can stumble while the interpreter exits
