"""A request that keeps its cache must not notice neighbours that lose theirs.

vLLM's batch-invariant mode makes tokens independent of who else is in the batch, so a quiet run
and a loaded one can be compared token by token. The mode is a process's: the engine has its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from .models import make_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
NUM_WATCHED = 12
POLICIES = ("h2o", "cab", "streaming", "random", "key_norm")


def quiet_and_loaded(model: str, enforce_eager: bool, side: str) -> dict[str, object]:
    """Tokens of the watched requests by themselves, and among evicting and aborted ones in a
    pool that is too small for all; and what the load did."""
    from vllm import LLM, SamplingParams

    from vllm_plugins import eviction_engine_args

    options = {"block_size": 16, "enable_prefix_caching": False}
    if side != "stock":
        options = eviction_engine_args(block_size=16, policy="dense", check_integrity=True)
    llm = LLM(
        model,
        max_model_len=2048,
        max_num_seqs=32,
        max_num_batched_tokens=1024,
        gpu_memory_utilization=0.2,  # other engines may run beside it
        kv_cache_memory_bytes=32 << 20,
        skip_tokenizer_init=True,
        enforce_eager=enforce_eager,
        seed=0,
        **options,
    )
    engine = llm.llm_engine
    rng = np.random.default_rng(11)
    watched = [rng.integers(0, 512, size=int(n)).tolist() for n in rng.integers(50, 700, 12)]

    def add(name, prompt, extra, max_tokens):
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            extra_args=extra,
        )
        return engine.add_request(name, {"prompt_token_ids": prompt}, params)

    def outputs():
        return [output for output in engine.step() if output.finished]

    quiet = []
    for i, prompt in enumerate(watched):
        add(f"q{i}", prompt, {}, 100)
        while engine.has_unfinished_requests():
            quiet += [list(output.outputs[0].token_ids) for output in outputs()]

    loaded, preempted, neighbours, arrived = {}, {}, [], 0
    running = {}
    while arrived < 5 * NUM_WATCHED or engine.has_unfinished_requests():
        if arrived < 5 * NUM_WATCHED and rng.random() < 0.9:
            if arrived % 5 == 0:
                add(f"w{arrived // 5}", watched[arrived // 5], {}, 100)
            else:
                extra = {
                    "kv_policy": str(rng.choice(POLICIES)),
                    "kv_sparsity": float(rng.choice([0.0, 0.5, 0.9])),
                }
                if side != "evicting":
                    extra = {}
                prompt = rng.integers(0, 512, size=int(rng.integers(1, 1500))).tolist()
                name = f"n{arrived}"
                running[name] = add(name, prompt, extra, int(rng.integers(1, 300)))
            arrived += 1
        if running and rng.random() < 0.02:
            engine.abort_request([running.pop(str(rng.choice(list(running))))], internal=True)
        for output in outputs():
            record = (output.kv_transfer_params or {"kv_eviction": {"preemptions": 0, "blocks_evicted": 0}})["kv_eviction"]
            if output.request_id[0] == "w":
                number = int(output.request_id[1:])
                loaded[number] = list(output.outputs[0].token_ids)
                preempted[number] = record["preemptions"]
            else:
                running.pop(output.request_id, None)
                neighbours.append(record)
    engine.engine_core.shutdown()
    return {
        "quiet": quiet,
        "loaded": [loaded[i] for i in range(NUM_WATCHED)],
        "watched_preemptions": [preempted[i] for i in range(NUM_WATCHED)],
        "preemptions": sum(r["preemptions"] for r in neighbours),
        "blocks_evicted": sum(r["blocks_evicted"] for r in neighbours),
    }


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
def test_tokens_of_a_request_do_not_depend_on_evicting_neighbours(enforce_eager, tmp_path):
    model = make_llama(tmp_path / "llama")
    output = tmp_path / "output.json"
    child = f"""
import json, pathlib
from tests.gpu.test_isolation import quiet_and_loaded
made = quiet_and_loaded({model!r}, {enforce_eager})
pathlib.Path({str(output)!r}).write_text(json.dumps(made))
"""
    subprocess.run(
        [sys.executable, "-c", child],
        check=True,
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "VLLM_BATCH_INVARIANT": "1"},
        timeout=240,
    )
    made = json.loads(output.read_text())
    assert made["blocks_evicted"] > 300, "the neighbours were meant to lose blocks"
    unaffected = [i for i, count in enumerate(made["watched_preemptions"]) if count == 0]
    assert made["preemptions"] + sum(made["watched_preemptions"]) > 0, "the pool was too large"
    assert len(unaffected) >= NUM_WATCHED // 2
    for i in unaffected:
        assert made["loaded"][i] == made["quiet"][i], i
