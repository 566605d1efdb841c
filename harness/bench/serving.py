"""Throughput on a GPU: stock vLLM against eviction, all sides in one go.

    python -m harness.bench.serving --regime headline --output results/serving-gpu/headline.json

An engine is started per group of sides, in a process of its own, on the same workload: offline
batches of random prompts, each from empty to done, after a warm-up batch. Requests choose their
method themselves, so one engine serves all sides of its group.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from ..records.files import read_json, write_json
from ..records.provenance import SCHEMA_VERSION, provenance, timestamp
from ..study.settings import ALL_SCORES
from .output import output_file
from .roofline import Workload, roofline

MODEL = Path(__file__).with_name("llama-3.1-8b")
NEVER = 10**8  # a budget in tokens that no request reaches: all is scored, nothing evicted


@dataclass(frozen=True)
class Load:
    """A workload, the sides it is measured on, and how often."""

    workload: Workload
    sides: tuple[str, ...]
    repeats: int = 1


@dataclass(frozen=True)
class Regime:
    """Loads that share engines, and the KV-cache memory these have.

    ``kv_cache_gib`` None: no memory flag at all, as a user starts; vLLM takes what is left.
    """

    kv_cache_gib: float | None
    max_model_len: int
    loads: dict[str, Load]
    max_num_seqs: int = 256


AGAIN = "stock_again"
"""Stock vLLM in a second engine: two equal sides show how far apart chance puts them."""
LAYER_GROUPS = 4
HEADLINE = Workload(96, 4000, 1024)
HEADLINE_SIDES = ("stock", "streaming_0.9", "streaming_0.5",
                  "h2o_0.9_sampled", "cab_0.9_sampled", "h2o_0.5_sampled",
                  "h2o_0.9", "h2o_0.5")  # fmt: skip
GROUP_SIDES = ("stock", "h2o_0.9_sampled", "h2o_0.9_groups")
SHORT_SIDES = ("stock", AGAIN, "off_0", "scoring_0_sampled", "h2o_0.9_sampled",
               "scoring_0", "h2o_0.9", "scoring_0_groups")  # fmt: skip
LONG_SIDES = ("stock", "streaming_0.9", "h2o_0.9_sampled", "cab_0.9_sampled", "h2o_0.5_sampled")
TIGHT_SIDES = ("stock", "h2o_0.9_sampled", "cab_0.9_sampled")
DEFAULT_SIDES = ("stock", "streaming_0.9", "h2o_0.9_sampled", "cab_0.9_sampled", "h2o_0.5_sampled",
                 AGAIN)  # fmt: skip
REGIMES = {
    "headline": Regime(8.0, 5120, {"headline": Load(HEADLINE, HEADLINE_SIDES)}),
    # `short` just fits into the same memory without eviction: no request waits for another.
    "short": Regime(
        8.0,
        5120,
        {
            "short": Load(Workload(64, 512, 512), SHORT_SIDES, repeats=3),
            "layer groups": Load(HEADLINE, GROUP_SIDES),
        },
    ),
    "long": Regime(16.0, 16640, {"long": Load(Workload(32, 16000, 512), LONG_SIDES)}),
    # Little memory, short prompts, long outputs: where eviction buys most.
    "tight": Regime(3.0, 4096, {"tight": Load(Workload(48, 2000, 2048), TIGHT_SIDES)}),
    # Short prompts and long answers, more of them than memory holds.
    "default": Regime(
        None, 4096, {"default memory": Load(Workload(512, 256, 2048), DEFAULT_SIDES)}, 512
    ),
}


@dataclass(frozen=True)
class Group:
    """Sides that share an engine. ``settings`` None: stock vLLM, plugin not loaded."""

    name: str
    settings: dict[str, Any] | None
    sides: Mapping[str, dict[str, Any] | None] = field(default_factory=dict)


def evict(policy: str, sparsity: float) -> dict[str, Any]:
    return {"kv_policy": policy, "kv_sparsity": sparsity}


def groups(scoring: dict[str, Any], sampling: dict[str, Any]) -> list[Group]:
    """``scoring``: settings of the engines that score; ``sampling``: laid over them in one."""
    heavy = {f"{p}_{s}": evict(p, s) for s in (0.9, 0.5) for p in ("h2o", "cab")}
    scored = {"scoring_0": {"kv_policy": "h2o", "kv_budget_tokens": NEVER}, **heavy}
    settings = {"policy": "dense", "request_policies": ["h2o", "cab"], **ALL_SCORES, **scoring}
    return [
        Group("stock", None, {"stock": None}),
        Group(
            "scoring off",
            {"policy": "dense", "request_policies": ["streaming"]},
            {
                "off_0": evict("streaming", 0),
                "streaming_0.9": evict("streaming", 0.9),
                "streaming_0.5": evict("streaming", 0.5),
            },
        ),
        Group(
            "scoring sampled",
            {**settings, **sampling},
            {f"{side}_sampled": extra for side, extra in scored.items()},
        ),
        Group("scoring on", settings, scored),
        Group(
            f"scoring sampled, {LAYER_GROUPS} layer groups",
            {**settings, **sampling, "layer_groups": LAYER_GROUPS},
            {f"{side}_groups": extra for side, extra in scored.items()},
        ),
        Group("stock again", None, {AGAIN: None}),
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
    if regime.kv_cache_gib is not None:
        options["kv_cache_memory_bytes"] = int(regime.kv_cache_gib * 2**30)
    started = time.perf_counter()
    llm = LLM(
        model,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=regime.max_model_len,
        max_num_seqs=regime.max_num_seqs,
        max_num_batched_tokens=8192,
        disable_log_stats=False,
        seed=0,
        **options,
    )
    start_seconds = time.perf_counter() - started
    num_blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    num_blocks //= (group.settings or {}).get("layer_groups", 1)  # a block holds one group's layers
    measured = []
    for name, load in regime.loads.items():
        workload = load.workload
        rng = np.random.default_rng(0)
        size = (workload.num_requests, workload.prompt_tokens)
        prompts = [{"prompt_token_ids": p} for p in rng.integers(1000, 100_000, size=size).tolist()]
        sides = {side: extra for side, extra in group.sides.items() if side in load.sides}
        for repeat in range(load.repeats):
            for side, extra in sides.items():
                if repeat == 0:
                    warm_up = SamplingParams(
                        max_tokens=8, ignore_eos=True, detokenize=False, extra_args=extra
                    )
                    llm.generate(prompts[:2], warm_up, use_tqdm=False)
                params = SamplingParams(
                    max_tokens=workload.output_tokens,
                    temperature=0.0,
                    ignore_eos=True,
                    detokenize=False,
                    extra_args=extra,
                )
                preempted = _preemptions(llm)
                started = time.perf_counter()
                outputs = llm.generate(prompts, params, use_tqdm=False)
                seconds = time.perf_counter() - started
                tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
                records = [(o.kv_transfer_params or {}).get("kv_eviction", {}) for o in outputs]
                measured.append(
                    {
                        "load": name,
                        "group": group.name,
                        "side": side,
                        "repeat": repeat,
                        "seconds": seconds,
                        "output_tokens": tokens,
                        "output_tokens_per_second": tokens / seconds,
                        "engine_start_seconds": start_seconds,
                        "kv_cache_tokens": num_blocks * block_size,
                        "preemptions": _preemptions(llm) - preempted,
                        "eviction": _summary(records),
                        "tokens_sha256": _digest(outputs),
                    }
                )
                print(f"  {name:9} {side:16} {tokens / seconds:8.1f} output tok/s", flush=True)
    llm.llm_engine.engine_core.shutdown()
    return measured


def _preemptions(llm: Any) -> int:
    """So far, by vLLM's own counter: stock counts like the others."""
    return sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")


def _digest(outputs: Sequence[Any]) -> str:
    """Of every token of every request: equal where two sides answered the same."""
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def _summary(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    if not any(records):
        return None
    return {
        "average_blocks": sum(r["average_blocks"] for r in records) / len(records),
        "effective_sparsity": sum(r["effective_sparsity"] for r in records) / len(records),
        "peak_blocks": max(r["peak_blocks"] for r in records),
        "blocks_evicted": sum(r["blocks_evicted"] for r in records),
        "decisions": sum(r["decisions"] for r in records),
        "decision_seconds": sum(r["decision_seconds"] for r in records),
        "policy_errors": sum("policy_error" in r for r in records),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--regime", choices=list(REGIMES), required=True)
    parser.add_argument("--model", default=str(MODEL), help="folder with a config.json")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--scoring", default="{}", help="JSON: settings of engines that score")
    parser.add_argument("--sampling", default='{"score_query_stride": 8, "score_layer_stride": 4}',
        help="JSON: further settings of the engine that samples its scores")  # fmt: skip
    parser.add_argument("--output", type=output_file, required=True)
    parser.add_argument("--group", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    regime = REGIMES[arguments.regime]
    wanted = {side for load in regime.loads.values() for side in load.sides}
    scoring, sampling = json.loads(arguments.scoring), json.loads(arguments.sampling)
    chosen = [group for group in groups(scoring, sampling) if wanted & group.sides.keys()]
    if arguments.group:
        group = next(g for g in chosen if g.name == arguments.group)
        measured = run_group(group, regime, arguments.model, arguments.block_size)
        write_json(arguments.output, measured)
        sys.stdout.flush()
        os._exit(0)  # the answer is written; an engine can stumble while the interpreter exits
    record = {
        "schema_version": SCHEMA_VERSION,
        "timestamp": timestamp(),
        "benchmark": "serving-gpu",
        "regime": arguments.regime,
        **asdict(regime),
        "block_size": arguments.block_size,
        "model": Path(arguments.model).name,
        "scoring": scoring,
        "sampling": sampling,
        "groups": [asdict(group) for group in chosen],
        "measured": [],
        **provenance([__spec__.name], "cuda"),
    }
    with tempfile.TemporaryDirectory() as folder:
        for group in chosen:
            output = Path(folder) / "measured.json"
            command = [sys.executable, "-m", "harness.bench.serving", *sys.argv[1:]]
            command += ["--group", group.name, "--output", str(output)]
            subprocess.run(command, check=True)
            record["measured"] += read_json(output)
            record["roofline"] = roofline(record)
            write_json(arguments.output, record)  # an engine that fails loses only its own
    print(table(record))


def table(record: dict[str, Any]) -> str:
    """Sides with their throughput, ratio to stock and share of the roofline's ratio."""
    lines = []
    for name in record["loads"]:
        speeds: dict[str, list[float]] = {}
        for entry in record["measured"]:
            if entry["load"] == name:
                speeds.setdefault(entry["side"], []).append(entry["output_tokens_per_second"])
        lines.append(f"{name:18} {'out tok/s':>9} {'of stock':>8} {'roofline':>8} {'reached':>7}")
        stock = median(speeds["stock"])
        for side, values in speeds.items():
            ratio = median(values) / stock
            bound = record["roofline"].get(name, {}).get(side)
            limit = f"{bound:8.2f} {100 * ratio / bound:6.1f}%" if bound else ""
            lines.append(f"  {side:16} {median(values):9.1f} {ratio:8.3f} {limit}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
