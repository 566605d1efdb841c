"""A request's answer in company against its answer alone, where company must not matter."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vllm_plugins.policies import ATTENTION, GRAPH, TOKEN_MASS, TOKEN_PEAK, get_policy

from ..engine.conftest import connector_of
from ..engine.traffic import add

TIE = 1e-3
"""Nats: batches of other sizes sum in another order, and two tokens that close may swap."""


def record_of(output: Any) -> dict[str, Any]:
    """What the plug-in says of a request; of samples, of the first one."""
    record = output.kv_transfer_params["kv_eviction"]
    return record[0] if isinstance(record, list) else record


def is_comparable(request: dict[str, Any], output: Any, whole_prompts: bool) -> bool:
    """Whether a request's answer must not depend on its company.

    Who keeps everything always answers the same. Who evicts does where a prompt is computed at
    once, and not again after a preemption, when the answer so far saw a whole cache. Who asks
    attention sums it over its own queries, so there also without a prefix from the cache. Whose
    pack waited for a free block saw a whole cache for longer.
    """
    if request.get("n", 1) > 1:
        return False
    record = record_of(output)
    if not get_policy(record["policy"]).evicts or request["extra"].get("kv_sparsity") == 0.0:
        return True
    if not whole_prompts or record["preemptions"] or record["decisions_deferred"]:
        return False
    return not (_asks_attention(request["extra"]) and record["cached_tokens"])


def _asks_attention(extra: dict[str, Any]) -> bool:
    policy = get_policy(extra["kv_policy"])
    arguments = policy.resolve(extra.get("kv_policy_args", {}))
    needed = policy.needed(arguments, extra["kv_granularity"])
    return bool(needed & {ATTENTION, GRAPH, TOKEN_MASS, TOKEN_PEAK})


def compare(llm: Any, request: dict[str, Any], output: Any, counts: Counter[str]) -> None:
    """Run ``request`` alone, without a cached prefix, and compare its answer with ``output``.

    Raises:
        AssertionError: they differ, and not by a tie.

    """
    assert llm.reset_prefix_cache()
    add(llm, "alone", **request, logprobs=5)
    engine = llm.llm_engine
    while engine.has_unfinished_requests():
        for alone in engine.step():
            last = alone
        connector_of(llm).check_integrity()
    quiet, crowded = last.outputs[0].token_ids, output.outputs[0].token_ids
    counts["compared"] += 1
    counts["compared_evicting"] += record_of(output)["blocks_evicted"] > 0
    if quiet == crowded:
        return
    place = next(i for i, pair in enumerate(zip(quiet, crowded, strict=True)) if len(set(pair)) > 1)
    likely = last.outputs[0].logprobs[place]
    best = likely[quiet[place]].logprob
    gap = best - likely[crowded[place]].logprob if crowded[place] in likely else float("inf")
    counts["ties"] += 1
    assert gap < TIE, (
        f"{output.request_id} answers otherwise than alone from token {place} on, by {gap:.3g} "
        f"nats: {request['extra']}, {record_of(output)}, alone {record_of(last)}"
    )
