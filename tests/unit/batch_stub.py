"""What ``harness.resources.batch_worker`` says, without vLLM: ``python -m tests.unit.batch_stub``.

Modes, by the engine argument ``load_format``: ``good``; ``no_start``: vLLM refuses; ``die``: it
ends in its third batch; ``error``: its third batch fails; ``slow``: no batch ever ends; ``policy``:
a policy fails in the third batch. A steady load is a batch too. Where prefixes are cached, all but
the first request find what is shared, as if there were one turn.
"""

import json
import os
import sys
import time

from harness.resources.host_profile import NAMES

HOST = (*NAMES, "plugin", "core_cpu", "process_cpu", "client_cpu")


def main():
    question = json.loads(sys.stdin.readline())
    mode = question["arguments"].get("load_format", "good")
    stock = question["eviction"] is None
    caches = question["prefix_caching"]
    assert stock == (os.environ.get("VLLM_PLUGINS") == "")
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1", "as vLLM starts by default"
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
        if batch.get("kind") == "steady":
            answer(steady(batch, stock))
            continue
        requests, turns = batch["num_requests"], batch.get("turns", 1)
        seconds = turns * (0.5 if evicts else 1.0) * (1 + batch["seed"] / 10)
        failed = int(mode == "policy" and number == 3)
        eviction = {"policy_errors": failed, "blocks_evicted": 3 * evicts}
        answer(
            {
                "seconds": seconds,
                "seconds_by_turn": [seconds / turns] * turns,
                "output_tokens": requests * batch["output_tokens"] * turns,
                "prompt_tokens": requests * batch["prompt_tokens"],
                "cached_tokens": caches * (requests - 1) * batch.get("shared_tokens", 0),
                "preemptions": 0 if evicts else 2,
                "eviction": None if stock else eviction,
                "tokens_sha256": "0" * 64,
                "scoring_seconds": {} if stock else {"block_mass": 0.1 * evicts},
            }
        )


def steady(load, stock):
    """Stock runs half of the sequences; half as many tokens live make a step twice as fast."""
    full = stock and load["output_tokens"][1] > 100
    ms_per_step = (20.0 if full else 10.0 if stock else 10.5) + load["seed"]
    running, seconds = load["num_sequences"] / (2 if full else 1), load["measured_seconds"]
    rate = 1e3 * running / ms_per_step
    parts = ("attention", "scores", "packing", "products", "other", "idle")
    return {
        "seconds": seconds,
        "output_tokens": rate * seconds,
        "preemptions": 3 * full,
        "steps": 1e3 * seconds / ms_per_step,
        "ms_per_step": ms_per_step,
        "tokens_per_step": running,
        "running": running,
        "kv_blocks": 100,
        "kv_blocks_used": 98 if full else 40,
        "sub_windows": [0.98 * rate, 1.02 * rate],
        "num_aged": 2,
        "settling_seconds": 1.0,
        "requests_ended": 5,
        "decision_seconds": 0.0 if stock else 0.1,
        "scoring_seconds": {},
        "eviction": None if stock else {"policy_errors": 0},
        "host": {
            "steps": 200,
            "ms_per_step": 12.0,
            **{part: n / 10 for n, part in enumerate(HOST)},
        },
        "split": {"steps": 20, "ms_per_step": 11.0, **{p: n / 10 for n, p in enumerate(parts)}},
    }


def answer(value):
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
