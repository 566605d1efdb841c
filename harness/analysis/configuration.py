"""What a record of quality and one of speed were measured under, in the same words. Pure.

Both sides must be one configuration before a figure joins them. A setting that a record does not
hold is ``NOT_RECORDED``, which equals no value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from vllm_plugins.config import EvictionConfig
from vllm_plugins.parsing import resolve_args
from vllm_plugins.request_settings import BLOCK

from ..records.former_names import eviction_of
from ..records.parameters import given_and_granularity
from ..records.specifications import level

NOT_RECORDED = "not recorded"
_EVICTION = (
    "score_half_life",
    "score_queries",
    "score_query_stride",
    "score_prompt_stride",
    "score_layer_stride",
    "layer_groups",
    "sink_blocks",
    "sink_tokens",
    "slack_tokens",
    "min_blocks",
)
"""What decides which tokens a request keeps, beside its own settings."""
Record = Mapping[str, Any]


class Identity(NamedTuple):
    """By what a run of quality finds its run of speed."""

    policy: str
    parameters: str
    """As JSON."""
    granularity: str
    level: str

    def __str__(self) -> str:
        given = "" if self.parameters == "{}" else f" with {self.parameters}"
        unit = " tokens" if self.level.startswith("b") else ""
        return f"{self.policy}{given} by {self.granularity} at {self.level[1:]}{unit}"


def identity(record: Record) -> Identity:
    """Policy, parameters, granularity and budget; of a run that evicts. Of parameters those other
    than the plain defaults: CAB's bridges are among them, as their default has a meaning.

    Raises:
        EvictionConfigError: a policy or parameter that is not there today.

    """
    run, eviction = record["specification"], eviction_of(record["specification"])
    stated = run["method"]
    method = stated if isinstance(stated, Mapping) else {"policy": stated}
    args, granularity = given_and_granularity(
        record["policy"], method.get("args", {}), method.get("granularity"), eviction, BLOCK
    )
    if "parameters" in record:  # older ones do not say what a default meant
        plain = resolve_args(record["policy"], {})
        args = {k: v for k, v in record["parameters"].items() if v != plain[k]}
    return Identity(
        record["policy"],
        json.dumps(args, sort_keys=True),
        granularity,
        level(record["sparsity"], record["budget_tokens"]),
    )


def quality_settings(record: Record) -> dict[str, Any]:
    """Of a record of perplexity. ``chunk`` is the most tokens of a prompt in a step."""
    engine, run = record["specification"]["engine"], record["specification"]
    protocol, prompt = engine.get("protocol", "chunked"), run.get("min_context", 1)
    return {
        "protocol": protocol,
        "prompt tokens": prompt,
        "tokens after the prompt": engine["context_length"] - prompt,
        "chunk": min(engine["prefill_chunk"], prompt),
        "dtype": record["engine"]["dtype"],
        "kv_cache_dtype": engine.get("kv_cache_dtype", "auto"),
        **_shared_settings(record),
    }


def speed_settings(record: Record) -> dict[str, Any]:
    """Of a record of a batch."""
    arguments = record["specification"]["engine"]["arguments"]
    load = record["specification"]["load"]
    step, prompt = arguments.get("max_num_batched_tokens"), load["prompt_tokens"]
    most = arguments.get("long_prefill_token_threshold") or prompt
    return {
        "protocol": "decode",
        "prompt tokens": prompt,
        "tokens after the prompt": load["output_tokens"],
        "chunk": NOT_RECORDED if step is None else min(step, most, prompt),
        "dtype": record.get("dtype", NOT_RECORDED),
        "kv_cache_dtype": arguments.get("kv_cache_dtype", "auto"),
        **_shared_settings(record),
    }


def difference(quality: Mapping[str, Any], speed: Mapping[str, Any]) -> str | None:
    """The first setting that is not the same on both sides; None where all are."""
    for name, value in quality.items():
        if value != speed[name] or value == NOT_RECORDED:
            return name
    return None


def _shared_settings(record: Record) -> dict[str, Any]:
    engine, eviction = record["specification"]["engine"], eviction_of(record["specification"])
    score = EvictionConfig(
        score=eviction.get("score", "default"), score_queries=eviction.get("score_queries", "all")
    )
    return {
        "model": engine.get("model_fingerprint", NOT_RECORDED),
        "block size": engine["block_size"],
        "score": score.score_at(identity(record).granularity),
        **{name: eviction.get(name, NOT_RECORDED) for name in _EVICTION},
    }
