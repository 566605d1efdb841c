"""What an engine decides, by policy; as a program, for an engine of several ranks.

python -m tests.engine.ranks MODEL RANKS OUTPUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

REQUESTS = {
    "dense": {"kv_policy": "dense"},
    "streaming": {"kv_policy": "streaming", "kv_sparsity": 0.7},
    "h2o": {"kv_policy": "h2o", "kv_sparsity": 0.7},
    "cab": {"kv_policy": "cab", "kv_sparsity": 0.7},
    "cab forman": {
        "kv_policy": "cab",
        "kv_sparsity": 0.7,
        "kv_policy_args": {"bridge_definition": "forman"},
    },
    "key_norm": {"kv_policy": "key_norm", "kv_sparsity": 0.7},
    "h2o by token": {"kv_policy": "h2o", "kv_sparsity": 0.7, "kv_granularity": "token"},
    "cab by token": {"kv_policy": "cab", "kv_sparsity": 0.7, "kv_granularity": "token"},
    "random by token": {"kv_policy": "random", "kv_sparsity": 0.7, "kv_granularity": "token"},
}


def decisions(llm: Any) -> dict[str, list[list[Any]]]:
    """Trace, tokens and log-probs of three requests at a time, by name of ``REQUESTS``."""
    from vllm import SamplingParams

    rng = np.random.default_rng(5)
    prompts = [{"prompt_token_ids": rng.integers(0, 256, n).tolist()} for n in (900, 400, 700)]
    made = {}
    for name, settings in REQUESTS.items():
        params = SamplingParams(
            max_tokens=8,
            temperature=0.0,
            logprobs=0,
            ignore_eos=True,
            detokenize=False,
            extra_args=settings,
        )
        made[name] = [_answer(output) for output in llm.generate(prompts, params, use_tqdm=False)]
    return made


def _answer(output: Any) -> list[Any]:
    record = output.kv_transfer_params["kv_eviction"]
    (answer,) = output.outputs
    tokens = list(answer.token_ids)
    log_probs = [entry[t].logprob for entry, t in zip(answer.logprobs, tokens, strict=True)]
    # Which physical blocks were free differs by engine.
    trace = [{k: v for k, v in entry.items() if k != "region"} for entry in record["trace"]]
    return [trace, tokens, log_probs]


if __name__ == "__main__":
    from .conftest import end, make_tiny

    folder, ranks, path = sys.argv[1:]
    engine = make_tiny(folder, {"tensor_parallel_size": int(ranks)})
    Path(path).write_text(json.dumps(decisions(engine)))
    end(engine)
