"""Records that were written under former names. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_plugins.parsing import RENAMED

from .specifications import PERPLEXITY, THROUGHPUT, effective_sparsity, level


def eviction_of(specification: Mapping[str, Any]) -> dict[str, Any]:
    """The eviction settings of a run's engine, under today's names.

    Args:
        specification: of a record, of any age.

    """
    settings = specification["engine"]["eviction"]
    return {RENAMED.get(name, name): value for name, value in settings.items()}


def in_todays_names(record: dict[str, Any]) -> dict[str, Any]:
    """An offline record under the names of today: committed ones are older than some of them.

    Mebibytes were called ``_mb`` once. What heads say today follows from the specification.
    """
    named = {
        f"{name.removesuffix('_mb')}_mib" if name.endswith("_mb") else name: value
        for name, value in record.items()
    }
    if "kind" in record:
        return named
    run = record["specification"]
    engine, sparsity, budget = run["engine"], record["sparsity"], run.get("budget_tokens")
    method = run["method"]
    return named | {
        "kind": PERPLEXITY if run.get("load") is None else THROUGHPUT,
        "key": f"{record['method']}_{level(sparsity, budget)}",
        "policy": method["policy"] if isinstance(method, Mapping) else method,
        "budget_tokens": budget,
        "level": level(sparsity, budget),
        "effective_sparsity": effective_sparsity(
            sparsity,
            budget,
            engine["context_length"],
            engine["block_size"],
            engine["eviction"]["min_blocks"],
        ),
    }


def load_in_todays_names(record: dict[str, Any]) -> dict[str, Any]:
    """A load's record, of a study or not, under the names of today.

    ``memory.evicted_share`` was called ``effective_sparsity``, which is a budget's. A study's
    record has its method and budget in ``run``; the first ones had them nowhere else.
    """
    memory = dict(record["memory"])
    if "effective_sparsity" in memory:
        memory["evicted_share"] = memory.pop("effective_sparsity")
    named = {**record, "memory": memory}
    if "run" not in record or "method" in record:
        return named
    run = record["run"]
    budget = run.get("budget_tokens")
    rate = "" if run["request_rate"] is None else f"_rate{run['request_rate']:g}"
    return named | {
        "key": f"{run['method']}_{level(run['sparsity'], budget)}{rate}",
        "method": run["method"],
        "policy": run.get("policy", run["method"]),
        "sparsity": run["sparsity"],
        "budget_tokens": budget,
        "level": level(run["sparsity"], budget),
        "effective_sparsity": None,
        "seed": run["seed"],
    }
