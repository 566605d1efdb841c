"""Prometheus text to the few numbers a load record keeps. Pure."""

from __future__ import annotations

import math

from prometheus_client.parser import text_string_to_metric_families

PREFIX = "vllm:kv_eviction_"
"""Of the plugin's own metrics."""
SERIES = {
    "vllm:kv_cache_usage_perc": "kv_cache_usage",
    "vllm:num_requests_running": "num_requests_running",
    "vllm:num_requests_waiting": "num_requests_waiting",
    "vllm:num_preemptions_total": "num_preemptions",
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:generation_tokens_total": "generation_tokens",
}
_CONFIG = "vllm:cache_config_info"


def parse_metrics(text: str) -> dict[str, float]:
    """``{name: value}``, summed over engines.

    Names are those of ``SERIES`` and, of the plugin, what follows ``vllm:`` (without ``_total``),
    with ``:policy`` behind it where there is that label. Only lines that are wanted are parsed:
    a whole page takes long enough to delay a request.
    """
    values: dict[str, float] = {}
    names = tuple(name + "{" for name in SERIES)
    for family in text_string_to_metric_families(_wanted(text, (*names, PREFIX))):
        for sample in family.samples:
            name = sample.name
            if name.endswith("_created") or math.isnan(sample.value):
                continue
            key = SERIES.get(name) or name.removeprefix("vllm:").removesuffix("_total")
            if policy := sample.labels.get("policy"):
                key += f":{policy}"
            values[key] = values.get(key, 0.0) + sample.value
    return values


def parse_cache_config(text: str) -> dict[str, int]:
    """``num_gpu_blocks``, ``block_size``, ``kv_cache_memory_bytes``, as far as known."""
    found = {}
    for family in text_string_to_metric_families(_wanted(text, (_CONFIG,))):
        for sample in family.samples:
            for name in ("num_gpu_blocks", "block_size", "kv_cache_memory_bytes"):
                if (value := sample.labels.get(name, "")).isdigit():
                    found[name] = int(value)
    return found


def _wanted(text: str, prefixes: tuple[str, ...]) -> str:
    return "".join(line + "\n" for line in text.splitlines() if line.startswith(prefixes))
