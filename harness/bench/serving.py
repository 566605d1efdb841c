"""Throughput on a GPU: stock vLLM against eviction, all sides in one go.

    python -m harness.bench.serving --regime headline --output results/serving-gpu/headline.json

An engine is started per group of sides, in a process of its own, on the same workload: offline
batches of random prompts, each from empty to done, after a warm-up batch. Requests choose their
method themselves, so one engine serves all sides of its group.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..records import SCHEMA_VERSION, provenance, read_json, timestamp, write_json
from .roofline import Workload, roofline

MODEL = Path(__file__).with_name("llama-3.1-8b")
NEVER = 10**8  # a budget in tokens that no request reaches: all is scored, nothing evicted


@dataclass(frozen=True)
class Regime:
    """A workload and the KV-cache memory it runs in."""

    workload: Workload
    kv_cache_gib: float
    repeats: int = 1
    sides: tuple[str, ...] = ()


REGIMES = {
    "headline": Regime(Workload(96, 4000, 1024), 8.0),
    "long": Regime(Workload(32, 16000, 512), 16.0, sides=("stock", "streaming_0.9", "h2o_0.9",
                                                          "cab_0.9", "h2o_0.5")),
    "short": Regime(Workload(64, 512, 256), 24.0, repeats=3, sides=("stock", "off_0", "scoring_0",
                                                                    "h2o_0.5", "h2o_0.9")),
}  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Sides that share an engine. ``settings`` None: stock vLLM, plugin not loaded."""

    name: str
    settings: dict[str, Any] | None
    sides: dict[str, dict[str, Any] | None] = field(default_factory=dict)


def evict(policy: str, sparsity: float) -> dict[str, Any]:
    return {"kv_policy": policy, "kv_sparsity": sparsity}


def groups(scoring: dict[str, Any]) -> list[Group]:
    """``scoring``: fields of ``EvictionConfig`` for the engine that scores."""
    heavy = {f"{p}_{s}": evict(p, s) for s in (0.9, 0.5) for p in ("h2o", "cab")}
    return [
        Group("stock", None, {"stock": None}),
        Group(
            "scoring off",
            {"policy": "dense", "request_policies": ["streaming", "random"]},
            {
                "off_0": evict("streaming", 0),
                "streaming_0.9": evict("streaming", 0.9),
                "random_0.9": evict("random", 0.9),
                "streaming_0.5": evict("streaming", 0.5),
            },
        ),
        Group(
            "scoring on",
            {"policy": "dense", "request_policies": ["h2o", "cab"], **scoring},
            {"scoring_0": {"kv_policy": "h2o", "kv_budget_tokens": NEVER}, **heavy},
        ),
    ]


def run_group(group: Group, regime: Regime, model: str, block_size: int) -> list[dict[str, Any]]:
    """All measurements of one engine, in this process (a fresh one)."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if group.settings is None:
        os.environ["VLLM_PLUGINS"] = ""
    import numpy as np
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"block_size": block_size, "enable_prefix_caching": False}
    if group.settings is not None:
        from vllm_plugins import eviction_engine_args

        options = eviction_engine_args(block_size=block_size, **group.settings)
    workload = regime.workload
    started = time.perf_counter()
    llm = LLM(
        model,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=workload.prompt_tokens + workload.output_tokens + 64,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        kv_cache_memory_bytes=int(regime.kv_cache_gib * 2**30),
        disable_log_stats=False,
        seed=0,
        **options,
    )
    start_seconds = time.perf_counter() - started
    rng = np.random.default_rng(0)
    size = (workload.num_requests, workload.prompt_tokens)
    prompts = [{"prompt_token_ids": p} for p in rng.integers(1000, 100_000, size=size).tolist()]
    measured = []
    for repeat in range(regime.repeats):
        for side, extra in group.sides.items():
            warm_up = SamplingParams(
                max_tokens=8, ignore_eos=True, detokenize=False, extra_args=extra
            )
            params = SamplingParams(
                max_tokens=workload.output_tokens,
                temperature=0.0,
                ignore_eos=True,
                detokenize=False,
                extra_args=extra,
            )
            llm.generate(prompts[:2], warm_up, use_tqdm=False)
            started = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - started
            tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            records = [(o.kv_transfer_params or {}).get("kv_eviction", {}) for o in outputs]
            measured.append(
                {
                    "group": group.name,
                    "side": side,
                    "repeat": repeat,
                    "seconds": seconds,
                    "output_tokens": tokens,
                    "output_tokens_per_second": tokens / seconds,
                    "engine_start_seconds": start_seconds,
                    "request_seconds": [
                        round(o.metrics.last_token_ts - o.metrics.scheduled_ts, 4) for o in outputs
                    ],
                    "eviction": _summary(records),
                    "first_tokens": [list(o.outputs[0].token_ids[:16]) for o in outputs[:4]],
                }
            )
            print(f"  {side:14} {tokens / seconds:8.1f} output tok/s", flush=True)
    llm.llm_engine.engine_core.shutdown()
    return measured


def _summary(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    if not any(records):
        return None
    return {
        "average_blocks": sum(r["average_blocks"] for r in records) / len(records),
        "peak_blocks": max(r["peak_blocks"] for r in records),
        "blocks_evicted": sum(r["blocks_evicted"] for r in records),
        "decisions": sum(r["decisions"] for r in records),
        "decision_seconds": sum(r["decision_seconds"] for r in records),
        "preemptions": sum(r["preemptions"] for r in records),
        "policy_errors": sum("policy_error" in r for r in records),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--regime", choices=list(REGIMES), required=True)
    parser.add_argument("--model", default=str(MODEL), help="folder with a config.json")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--sides", nargs="+", help="only these")
    parser.add_argument("--scoring", default="{}", help="JSON: settings of the engine that scores")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--group", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    regime = REGIMES[arguments.regime]
    wanted = arguments.sides or regime.sides
    chosen = [
        Group(g.name, g.settings, {s: e for s, e in g.sides.items() if not wanted or s in wanted})
        for g in groups(json.loads(arguments.scoring))
    ]
    chosen = [group for group in chosen if group.sides]
    if arguments.group:
        group = next(g for g in chosen if g.name == arguments.group)
        measured = run_group(group, regime, arguments.model, arguments.block_size)
        arguments.output.write_text(json.dumps(measured))
        sys.stdout.flush()
        os._exit(0)  # the answer is written; an engine can stumble while the interpreter exits
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        for group in chosen:
            output = Path(folder) / "measured.json"
            command = [sys.executable, "-m", "harness.bench.serving", *sys.argv[1:]]
            command += ["--group", group.name, "--output", str(output)]
            subprocess.run(command, check=True)
            measured += read_json(output)
    source = provenance()
    record = {
        "schema_version": SCHEMA_VERSION,
        "timestamp": timestamp(),
        "benchmark": "serving-gpu",
        "regime": arguments.regime,
        "workload": asdict(regime.workload),
        "kv_cache_gib": regime.kv_cache_gib,
        "block_size": arguments.block_size,
        "model": Path(arguments.model).name,
        "scoring": json.loads(arguments.scoring),
        "groups": [asdict(group) for group in chosen],
        "measured": measured,
        **source,
    }
    record["roofline"] = roofline(record)
    write_json(arguments.output, record)
    print(table(record))


def table(record: dict[str, Any]) -> str:
    """Sides with their throughput, ratio to stock and share of the roofline's ratio."""
    speeds: dict[str, list[float]] = {}
    for entry in record["measured"]:
        speeds.setdefault(entry["side"], []).append(entry["output_tokens_per_second"])
    best = {side: sorted(values)[len(values) // 2] for side, values in speeds.items()}
    lines = [f"{'side':14} {'out tok/s':>9} {'of stock':>8} {'roofline':>8} {'reached':>7}"]
    for side, speed in best.items():
        bound = record["roofline"].get(side)
        ratio = speed / best["stock"] if "stock" in best else float("nan")
        limit = f"{bound:8.2f} {100 * ratio / bound:6.1f}%" if bound else ""
        lines.append(f"{side:14} {speed:9.1f} {ratio:8.3f} {limit}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
