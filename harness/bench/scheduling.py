"""What eviction adds to vLLM's scheduling, by a loop that has no model.

    python -m harness.bench.scheduling --output results/scheduling.json

A scheduler of stock vLLM and one of each method serve the same closed loop of sequences in its
steady state (``analysis/renewal.py``), a step each in turn. What workers would answer is made up: a
token for whoever has computed all it has. Each has a pool for everybody, so nobody waits, and what
differs is the plug-in's. Timed are ``schedule`` and ``update_from_output``, the two parts of a step
that run on the host whatever the device (``vllm/v1/engine/core.py``, ``step_with_batch_queue``).
Workers' own part is not in it, nor are their reports of scores.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..analysis.renewal import length_at_hand, new_length
from ..records.provenance import provenance
from .output import output_file, write_record

MODEL = Path(__file__).parent / "llama-3.1-8b"
BLOCK_SIZE = 32  # what CPUs know, too
PROMPT_TOKENS, OUTPUT_TOKENS = 256, (64, 8192)
METHODS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "nothing evicted": {"policy": "h2o", "sparsity": 0.0},
    "h2o": {"policy": "h2o", "sparsity": 0.9},
    "cab": {"policy": "cab", "sparsity": 0.9},
    "streaming, by block": {"policy": "streaming", "sparsity": 0.9, "granularity": "block"},
}
"""Settings of each; of stock vLLM none."""


def scheduler(
    settings: Mapping[str, Any] | None, prefix_caching: bool, num_sequences: int
) -> tuple[Any, Any]:
    """vLLM's scheduler of steps in flight, and what hashes its requests' blocks (or None).

    Args:
        settings: of ``eviction_engine_args``; None: stock vLLM.
        prefix_caching: whether prefixes are shared, which they are by vLLM's default.
        num_sequences: that run at once.

    """
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from vllm_plugins import eviction_engine_args
    from vllm_plugins.spec import evictable_specs

    max_model_len = PROMPT_TOKENS + OUTPUT_TOKENS[1]
    arguments: dict[str, Any] = {
        "model": str(MODEL),
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "dtype": "bfloat16",
        "max_model_len": max_model_len,
        "max_num_seqs": num_sequences,
        "max_num_batched_tokens": 8192,
        "block_size": BLOCK_SIZE,
        "enable_prefix_caching": prefix_caching,
    }
    if settings is not None:
        arguments |= eviction_engine_args(
            block_size=BLOCK_SIZE, prefix_caching=prefix_caching, **settings
        )
    config = EngineArgs(**arguments).create_engine_config()
    # Set here, as vLLM puts it out on CPUs, whose workers run a step at a time. There are none.
    config.scheduler_config.async_scheduling = True
    num_blocks = num_sequences * (max_model_len // BLOCK_SIZE + 1) + 1
    config.cache_config.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=8, head_size=128, dtype=torch.bfloat16
    )
    layers: dict[str, Any] = {f"model.layers.{i}.self_attn.attn": spec for i in range(32)}
    if settings is not None:
        layers = dict(evictable_specs(layers, 1, max_model_len))
    group = KVCacheGroupSpec(list(layers), next(iter(layers.values())))
    made = AsyncScheduler(
        config,
        KVCacheConfig(num_blocks, [], [group]),
        StructuredOutputManager(config),
        block_size=BLOCK_SIZE,
        log_stats=True,
    )
    hasher = None
    if prefix_caching or made.connector is not None:  # as ``EngineCore``
        hash_function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_function)
        hasher = get_request_block_hasher(BLOCK_SIZE, hash_function)
    return made, hasher


class ClosedLoop:
    """``num_sequences`` sequences under a scheduler; each that ends is replaced.

    Equal seeds are equal sequences.
    """

    def __init__(self, scheduler: Any, hasher: Any, num_sequences: int, seed: int) -> None:
        self.scheduler, self._hasher, self._random = scheduler, hasher, random.Random(seed)
        self._added = 0
        self._flying: tuple[Any, list[list[int]]] | None = None
        for _ in range(num_sequences):
            length = length_at_hand(self._random.random(), OUTPUT_TOKENS)
            self._add(length, age=int(self._random.random() * length))

    def _add(self, length: int, age: int = 0) -> None:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        self._added += 1
        params = SamplingParams(max_tokens=length - age, ignore_eos=True)
        tokens = [self._random.randrange(1000) for _ in range(PROMPT_TOKENS + age)]
        name = f"{self._added}"
        request = Request(name, tokens, params, None, block_hasher=self._hasher)
        self.scheduler.add_request(request)

    def step(self) -> tuple[float, float]:
        """Schedule a step, then take in what came of the one before; the seconds of both."""
        from vllm.v1.outputs import ModelRunnerOutput

        started = time.perf_counter()
        output = self.scheduler.schedule()
        scheduling = time.perf_counter() - started
        known, names = self.scheduler.requests, list(output.num_scheduled_tokens)
        # A chunk that does not end its prompt brings no token.
        sampled = [
            [1] if known[r].num_computed_tokens >= known[r].num_tokens else [] for r in names
        ]
        before, self._flying = self._flying, (output, sampled)
        if before is None:
            return scheduling, 0.0
        names = list(before[0].num_scheduled_tokens)
        places = {name: place for place, name in enumerate(names)}
        answer = ModelRunnerOutput(names, places, before[1])
        started = time.perf_counter()
        outputs = self.scheduler.update_from_output(before[0], answer)
        updating = time.perf_counter() - started
        for of_client in outputs.values():
            for one in of_client.outputs:
                if one.finish_reason is not None:
                    self._add(new_length(self._random.random(), OUTPUT_TOKENS))
        return scheduling, updating

    @property
    def decoding(self) -> bool:
        """Whether every sequence has its prompt behind it."""
        running = self.scheduler.running
        return not self.scheduler.waiting and all(
            r.num_computed_tokens >= r.num_prompt_tokens for r in running
        )


def measure(
    methods: Sequence[str],
    prefix_caching: bool,
    num_sequences: int,
    settle_steps: int,
    steps: int,
    seed: int,
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of scheduling and updating by method, of ``steps`` steps each.

    The first ``settle_steps`` after all prompts are not timed.
    """
    loops = {
        name: ClosedLoop(
            *scheduler(METHODS[name], prefix_caching, num_sequences), num_sequences, seed
        )
        for name in methods
    }
    for loop in loops.values():
        while not loop.decoding:
            loop.step()
        for _ in range(settle_steps):
            loop.step()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
    for _ in range(steps):
        for name, loop in loops.items():
            seconds[name].append(loop.step())
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--settle-steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=output_file, required=True)
    arguments = parser.parse_args()
    if min(arguments.sequences, arguments.steps) < 1 or arguments.settle_steps < 0:
        parser.error("--sequences and --steps must be at least 1, --settle-steps at least 0")
    measured = []
    for prefix_caching in (False, True):
        for seed in arguments.seeds:
            sizes = (arguments.sequences, arguments.settle_steps, arguments.steps)
            found = measure(tuple(METHODS), prefix_caching, *sizes, seed)
            for name, seconds in found.items():
                schedule = 1e3 * statistics.median(scheduling for scheduling, _ in seconds)
                update = 1e3 * statistics.median(updating for _, updating in seconds)
                print(
                    f"prefix caching {prefix_caching!s:5} seed {seed} {name:20} "
                    f"schedule {schedule:6.2f} ms  update {update:6.2f} ms",
                    flush=True,
                )
                measured.append(
                    {
                        "method": name,
                        "settings": METHODS[name],
                        "prefix_caching": prefix_caching,
                        "sequences": arguments.sequences,
                        "seed": seed,
                        "schedule_ms": schedule,
                        "update_ms": update,
                        "seconds": [[round(part, 6) for part in step] for step in seconds],
                    }
                )
    fields = {
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        "block_size": BLOCK_SIZE,
        "measured": measured,
    }
    write_record(arguments.output, "scheduling", fields, provenance([__spec__.name]))


if __name__ == "__main__":
    main()
