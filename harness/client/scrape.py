"""Prometheus text to the few numbers a load record keeps. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

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
LIVE_SHARE = "kv_eviction_live_share"
_SHARES = ("kv_cache_usage", LIVE_SHARE)
"""Averaged over engines; a sum of shares is none."""
_CONFIG = "vllm:cache_config_info"
_CONFIG_FIELDS = ("num_gpu_blocks", "block_size", "kv_cache_memory_bytes")


def parse_metrics(
    text: str, on_malformed: Callable[[str], None] = lambda line: None
) -> dict[str, float]:
    """``{name: value}``, finite, summed over engines; shares are their mean.

    Names are those of ``SERIES`` and, of the plugin, what follows ``vllm:`` (without ``_total``),
    with ``:policy`` behind it where there is that label. Of its histograms sum and count are kept.
    Only lines that are wanted are parsed: a whole page takes long enough to delay a request.

    Args:
        text: of the page.
        on_malformed: told each wanted line that cannot be read, or whose value is not finite;
            it is left out. The live share of nothing is NaN by design: that line is only left out.

    """
    found: dict[str, list[float]] = {}
    prefixes = (*(name + end for name in SERIES for end in "{ "), PREFIX)
    for line, sample in _samples(text, prefixes, on_malformed):
        if sample.name.endswith("_created"):
            continue
        key = SERIES.get(sample.name) or sample.name.removeprefix("vllm:").removesuffix("_total")
        if policy := sample.labels.get("policy"):
            key += f":{policy}"
        value = _as_float(sample.value)
        if math.isfinite(value):
            found.setdefault(key, []).append(value)
        elif not (key == LIVE_SHARE and math.isnan(value)):
            on_malformed(line)
    values = {
        key: sum(of_engines) / (len(of_engines) if key in _SHARES else 1)
        for key, of_engines in found.items()
    }
    return {key: value for key, value in values.items() if math.isfinite(value)}


def parse_cache_config(text: str) -> dict[str, int]:
    """``num_gpu_blocks``, ``block_size``, ``kv_cache_memory_bytes``, as far as known."""
    found = {}
    for _, sample in _samples(text, (_CONFIG,), lambda line: None):
        for name in _CONFIG_FIELDS:
            value = sample.labels.get(name, "")
            if value.isdecimal() and len(value) < 20:
                found[name] = int(value)
    return found


def _samples(
    text: str, prefixes: tuple[str, ...], on_malformed: Callable[[str], None]
) -> Iterator[tuple[str, Any]]:
    """Lines that begin with one of ``prefixes``, parsed one by one: a bad one spoils no other."""
    for line in text.splitlines():
        if not line.startswith(prefixes) or line.partition("{")[0].endswith("_bucket"):
            continue
        try:
            (family,) = text_string_to_metric_families(line)
            (sample,) = family.samples
        except (ValueError, TypeError, AttributeError, LookupError):
            on_malformed(line)
        else:
            yield line, sample


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # the parser gives whole numbers of any length
        return math.inf
