"""What ``harness.resources.batch_worker`` says, without vLLM: ``python -m tests.unit.batch_stub``.

Modes, by the engine argument ``load_format``: ``good``; ``no_start``: vLLM refuses; ``die``: it
ends in its third batch; ``error``: its third batch fails; ``slow``: no batch ever ends; ``policy``:
a policy fails in the third batch.
"""

import json
import os
import sys
import time


def main():
    question = json.loads(sys.stdin.readline())
    mode = question["arguments"].get("load_format", "good")
    stock = question["eviction"] is None
    assert stock == (os.environ.get("VLLM_PLUGINS") == "")
    if mode == "no_start":
        answer({"error": "ValueError: this model cannot be"})
        return
    answer({"engine_start_seconds": 1.5, "kv_cache_tokens": 1000, "dtype": "float32"})
    for number, line in enumerate(sys.stdin, 1):
        batch = json.loads(line)
        if mode == "slow" or os.environ.get("SLOW"):
            time.sleep(600)
        if mode == "die" and number == 3:
            print("RuntimeError: out of memory", file=sys.stderr)
            os._exit(7)
        if mode == "error" and number == 3:
            answer({"error": "RuntimeError: CUDA is unwell"})
            continue
        evicts = batch["settings"].get("kv_sparsity", 0) > 0
        tokens = batch["num_requests"] * batch["output_tokens"]
        failed = int(mode == "policy" and number == 3)
        eviction = {"policy_errors": failed, "blocks_evicted": 3 * evicts}
        answer(
            {
                "seconds": (0.5 if evicts else 1.0) * (1 + batch["seed"] / 10),
                "output_tokens": tokens,
                "preemptions": 0 if evicts else 2,
                "eviction": None if stock else eviction,
                "tokens_sha256": "0" * 64,
                "scoring_seconds": {} if stock else {"block_mass": 0.1 * evicts},
            }
        )


def answer(value):
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
