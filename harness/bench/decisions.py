"""How long the scheduler takes to decide for one request.

    python -m harness.bench.decisions --output results/decisions.json

One decision = ``Ledger.decide`` for a request and layer group with so many live blocks: gather
their scores, run the policy, check its answer, note it. Two cases: ``one_over`` (decode:
one block too many) and ``half`` (sparsity 0.5 at once).
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from vllm_plugins.config import EvictionConfig
from vllm_plugins.ledger import Ledger
from vllm_plugins.live_blocks import LiveBlocks
from vllm_plugins.policies import ATTENTION, KEY_NORM, get_policy, policy_names

from ..records.provenance import provenance
from .output import output_file, write_record

BLOCK_SIZE = 16
WARM_UP = 5
CASES: list[tuple[str, dict[str, Any]]] = [
    (name, {}) for name in policy_names() if get_policy(name).select is not None
]
CASES.append(("cab", {"bridge_definition": "forman"}))


class _Request:
    request_id = "r"
    num_preemptions = 0

    def __init__(self, num_tokens: int) -> None:
        self.num_prompt_tokens = self.num_tokens = self.num_computed_tokens = num_tokens

    def is_finished(self) -> bool:
        return False


def measure(policy: str, parameters: dict, num_blocks: int, keep: int, repeats: int) -> list[float]:
    """Seconds of ``repeats`` decisions, each by a fresh ledger."""
    config = EvictionConfig()
    rng = np.random.default_rng(0)
    scores = rng.exponential(size=num_blocks + 1)
    seconds = []
    for _ in range(WARM_UP + repeats):
        ledger = Ledger(config, BLOCK_SIZE, 1, num_blocks + 1)
        request = _Request(num_blocks * BLOCK_SIZE)
        extra = {
            "kv_policy": policy,
            "kv_granularity": "block",
            "kv_budget_tokens": keep * BLOCK_SIZE,
            "kv_policy_args": parameters,
        }
        ledger.admit(request, config.request_settings(extra, BLOCK_SIZE), seed=0)
        step = ledger.schedule({"r": request.num_tokens}, 0)
        ledger.observe(step, {ATTENTION: scores, KEY_NORM: scores})
        ids = rng.permutation(num_blocks) + 1
        live = LiveBlocks(np.arange(num_blocks), ids, num_seen=num_blocks)
        if parameters.get("bridge_definition") == "forman":
            rows = rng.exponential(size=(num_blocks, num_blocks)).astype(np.float32)
            live.graph_rows = {
                int(ids[i]): [(ids[: i + 1], rows[i, : i + 1])] for i in range(num_blocks)
            }
        ledger.requests["r"].groups[0] = live
        blocks: Any = range(num_blocks)  # only its length counts: nothing is new
        started = time.perf_counter()
        victims = ledger.decide("r", 0, request.num_tokens, blocks)
        seconds.append(time.perf_counter() - started)
        assert len(victims) == num_blocks - keep
    return seconds[WARM_UP:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--output", type=output_file, required=True)
    arguments = parser.parse_args()
    measured = []
    print(f"{'policy':16} {'blocks':>6} {'case':9} {'median us':>9} {'p95 us':>8}")
    for policy, parameters in CASES:
        for num_blocks in arguments.blocks:
            for case, keep in (("one_over", num_blocks - 1), ("half", num_blocks // 2)):
                repeats = arguments.repeats if not parameters else max(10, arguments.repeats // 10)
                seconds = measure(policy, parameters, num_blocks, keep, repeats)
                name = "/".join([policy, *parameters.values()])
                median, p95 = np.quantile(seconds, [0.5, 0.95]) * 1e6
                print(f"{name:16} {num_blocks:6} {case:9} {median:9.1f} {p95:8.1f}", flush=True)
                measured.append(
                    {
                        "policy": policy,
                        "parameters": parameters,
                        "live_blocks": num_blocks,
                        "keep": keep,
                        "case": case,
                        "median_us": float(median),
                        "p95_us": float(p95),
                        "seconds": [round(s, 9) for s in seconds],
                    }
                )
    made = provenance([__spec__.name])
    write_record(arguments.output, "decisions", {"measured": measured}, made)


if __name__ == "__main__":
    main()
