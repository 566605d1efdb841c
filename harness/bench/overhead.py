"""What the plugin costs in speed where it does not evict, and where its scoring time goes.

    python -m harness.bench.overhead --output results/overhead.json

Engines alternate, in processes of their own: ``stock`` (vLLM with no plugin loaded), one that
samples its scores as servers do by default, and one that gathers all. The latter two serve
``scoring`` (H2O scores under a budget nobody reaches) and ``h2o_0.9``, the sampling one also
``sparsity_0`` (nothing is gathered). Each measurement is one batch of requests from empty to done,
after a warm-up batch.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from ..inputs.models import DEFAULT_MODEL, resolve_model
from ..records.files import read_json, write_json
from ..records.provenance import SCHEMA_VERSION, provenance, timestamp
from ..study.settings import ALL_SCORES
from .output import output_file

ENGINE = {
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 512,
    "long_prefill_token_threshold": 64,
    "kv_cache_memory_bytes": 800 << 20,
    "enforce_eager": True,
    "use_tqdm_on_load": False,
    "seed": 0,
}
BATCH = {"num_requests": 8, "prompt_tokens": 512, "output_tokens": 128}
SCORING = {"kv_policy": "h2o", "kv_budget_tokens": 1_000_000}
H2O = {"kv_policy": "h2o", "kv_sparsity": 0.9}
ENGINES: dict[str, tuple[dict[str, Any] | None, dict[str, dict[str, Any] | None]]] = {
    "stock": (None, {"stock": None}),
    "sampled": (
        {},
        {
            "sparsity_0": {"kv_policy": "h2o", "kv_sparsity": 0},
            "scoring_sampled": SCORING,
            "h2o_0.9_sampled": H2O,
        },
    ),
    "all": (ALL_SCORES, {"scoring": SCORING, "h2o_0.9": H2O}),
}
"""Settings of an engine (None: no plugin) and what each side asks of it."""


def run_engine(name: str, model: str, repeats: int) -> list[dict[str, Any]]:
    """All measurements of one engine, in this process (a fresh one)."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")
    settings, sides = ENGINES[name]
    if settings is None:
        os.environ["VLLM_PLUGINS"] = ""
    import numpy as np
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"block_size": 32, "enable_prefix_caching": False}
    if settings is not None:
        from vllm_plugins import eviction_engine_args

        options = eviction_engine_args(policy="dense", **settings)
    llm = LLM(model, **ENGINE, **options)
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    prompts = np.random.default_rng(0).integers(
        0, vocabulary, size=(BATCH["num_requests"], BATCH["prompt_tokens"])
    )
    measured = []
    for repeat in range(-1, repeats):
        for side, extra in sides.items():
            params = SamplingParams(
                max_tokens=BATCH["output_tokens"],
                temperature=0.0,
                ignore_eos=True,
                detokenize=False,
                extra_args=extra,
            )
            before = _scoring_seconds(llm, settings)
            started = time.perf_counter()
            outputs = llm.generate(
                [{"prompt_token_ids": p} for p in prompts.tolist()], params, use_tqdm=False
            )
            seconds = time.perf_counter() - started
            tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            after = _scoring_seconds(llm, settings)
            if repeat >= 0:
                measured.append(
                    {
                        "side": side,
                        "seconds": seconds,
                        "output_tokens": tokens,
                        "scoring_seconds": {k: v - before.get(k, 0.0) for k, v in after.items()},
                    }
                )
    llm.llm_engine.engine_core.shutdown()
    return measured


def _scoring_seconds(llm: Any, settings: dict[str, Any] | None) -> dict[str, float]:
    if settings is None:
        return {}
    connector = llm.llm_engine.engine_core.engine_core.scheduler.connector
    return dict(connector.scoring_seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=2, help="engine starts per side")
    parser.add_argument("--repeats", type=int, default=3, help="measured batches per start")
    parser.add_argument("--output", type=output_file)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        measured = run_engine(arguments.engine, arguments.model, arguments.repeats)
        write_json(arguments.output, measured)
        sys.stdout.flush()
        os._exit(0)  # stock vLLM can abort while the interpreter exits; the answer is written
    model = resolve_model(arguments.model)
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        for round_number in range(arguments.rounds):
            for name in ENGINES:
                print(f"round {round_number + 1}: {name}", flush=True)
                output = Path(folder) / "measured.json"
                command = [sys.executable, "-m", "harness.bench.overhead", "--engine", name]
                command += ["--model", model, "--repeats", str(arguments.repeats)]
                subprocess.run([*command, "--output", str(output)], check=True)
                for entry in read_json(output):
                    measured.append({"round": round_number, **entry})
    by_side: dict[str, list[dict[str, Any]]] = {}
    for entry in measured:
        by_side.setdefault(entry["side"], []).append(entry)
    speed = {
        side: median(e["output_tokens"] / e["seconds"] for e in entries)
        for side, entries in by_side.items()
    }
    record = {
        "schema_version": SCHEMA_VERSION,
        "timestamp": timestamp(),
        "benchmark": "overhead",
        "model": Path(model).name,
        "engine": ENGINE,
        "batch": BATCH,
        "measured": measured,
        "median_output_tokens_per_second": speed,
        "ratio_to_stock": {side: value / speed["stock"] for side, value in speed.items()},
        **provenance([__spec__.name]),
    }
    if arguments.output:
        write_json(arguments.output, record)
    print(f"\n{'side':15} {'tok/s':>7} {'of stock':>8}  scoring, share of wall time by phase")
    for side, entries in by_side.items():
        wall = sum(e["seconds"] for e in entries)
        phases = {k for e in entries for k in e["scoring_seconds"]}
        shares = {p: sum(e["scoring_seconds"].get(p, 0) for e in entries) / wall for p in phases}
        text = ", ".join(f"{p} {100 * s:.1f}%" for p, s in sorted(shares.items()) if s > 0)
        print(f"{side:15} {speed[side]:7.1f} {record['ratio_to_stock'][side]:8.3f}  {text}")


if __name__ == "__main__":
    main()
