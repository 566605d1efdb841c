"""What the authors of a method expected, what was published, what was measured here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .tables import Row, change, level, times


@dataclass(frozen=True)
class Expectation:
    """Claims about a method with their conditions, from its paper."""

    method: str
    source: str
    expected: str
    published: str
    conditions: str


EXPECTATIONS = (
    Expectation(
        "h2o",
        "Zhang et al., NeurIPS 2023, arXiv:2306.14048",
        "sparsity 0.5: perplexity +4%, 50% of the memory, 2x throughput; 0.9: +25%, 10%, 8x",
        "a fifth of the KV cache, heavy hitters and recent tokens, answers as well as all of it; "
        "up to 29x the throughput of DeepSpeed Zero-Inference and Accelerate, 3x of FlexGen; "
        "latency at one batch size up to 1.9x lower",
        "OPT-6.7B and OPT-30B, offloading, tokens evicted one by one while decoding",
    ),
    Expectation(
        "streaming",
        "Xiao et al., ICLR 2024, arXiv:2309.17453",
        "-",
        "the first tokens and a recent window keep perplexity stable at any length: "
        "perplexity 5.40, as a sliding window recomputed at every token (5.43)",
        "Llama-2-13B, first book of PG-19's test split (65K tokens), 4 sinks + 1,020 recent "
        "tokens, positions counted within the cache",
    ),
    Expectation(
        "cab",
        "curvature-aware budget; no publication with figures is known",
        "sparsity 0.5: perplexity +2.5%, 50% of the memory, 2x throughput; 0.9: +17%, 10%, 8x; "
        "ahead of H2O at the same budget",
        "-",
        "-",
    ),
)


def expectation_rows(results: dict[str, Any], conditions: str) -> list[Row]:
    """Header and rows for the methods of ``results`` that somebody has claimed something about.

    Args:
        results: ``aggregated_results.json``.
        conditions: under which they were measured, in words.

    """
    table: list[Row] = [
        ("method", "expected by the authors", "published", "their conditions", "measured here",
         "conditions here"),
    ]  # fmt: skip
    dense = next((e for e in results.values() if e["method"] == "dense"), None)
    for claim in EXPECTATIONS:
        entries = [(k, e) for k, e in results.items() if e["method"] == claim.method]
        if entries:
            measured = "; ".join(_measured(key, entry, dense) for key, entry in entries)
            table.append(
                (
                    f"{claim.method} ({claim.source})",
                    claim.expected,
                    claim.published,
                    claim.conditions,
                    measured,
                    conditions,
                )
            )
    return table


def _measured(key: str, entry: dict[str, Any], dense: dict[str, Any] | None) -> str:
    text = f"{level(key, entry)}: perplexity {entry['perplexity']['mean']:.2f}"
    if dense is not None:
        text += f" ({change(entry['perplexity']['mean'], dense['perplexity']['mean'])})"
        text += f", {_ratio(entry, dense, 'peak_memory_mb'):.0%} of the KV memory"
        if ratio := entry.get("throughput", {}).get("against_dense"):
            once = " (one load)" if ratio["num_runs"] == 1 else ""
            text += f", {times(ratio, 'x')} throughput{once}"
    return text


def _ratio(entry: dict[str, Any], dense: dict[str, Any], metric: str) -> float:
    return entry[metric]["mean"] / dense[metric]["mean"]
