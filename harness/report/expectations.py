"""What the authors of a method expected, what was published, what was measured here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .cells import change, differs, level, times
from .tables import Row

TOLERANCE = 0.05
"""A run stands beside an expectation whose sparsity is this close to its effective one."""


@dataclass(frozen=True)
class Expectation:
    """Claims about a method with their conditions, from its paper."""

    method: str
    source: str
    expected: dict[float, str]
    """By sparsity; empty where the authors named none."""
    published: str
    conditions: str
    beside: str = ""
    """What was expected at every sparsity."""


EXPECTATIONS = (
    Expectation(
        "h2o",
        "Zhang et al., NeurIPS 2023, arXiv:2306.14048",
        {
            0.5: "perplexity +4%, 50% of the memory, 2x throughput",
            0.9: "perplexity +25%, 10% of the memory, 8x throughput",
        },
        "a fifth of the KV cache, heavy hitters and recent tokens, answers as well as all of it; "
        "up to 29x the throughput of DeepSpeed Zero-Inference and Accelerate, 3x of FlexGen; "
        "latency at one batch size up to 1.9x lower",
        "OPT-6.7B and OPT-30B, offloading, tokens evicted one by one while decoding",
    ),
    Expectation(
        "streaming",
        "Xiao et al., ICLR 2024, arXiv:2309.17453",
        {},
        "the first tokens and a recent window keep perplexity stable at any length: "
        "perplexity 5.40, as a sliding window recomputed at every token (5.43)",
        "Llama-2-13B, first book of PG-19's test split (65K tokens), 4 sinks + 1,020 recent "
        "tokens, positions counted within the cache",
    ),
    Expectation(
        "cab",
        "curvature-aware budget; no publication with figures is known",
        {
            0.5: "perplexity +2.5%, 50% of the memory, 2x throughput",
            0.9: "perplexity +17%, 10% of the memory, 8x throughput",
        },
        "-",
        "-",
        beside="ahead of H2O at the same budget",
    ),
)


def expectation_rows(results: dict[str, Any], conditions: str) -> list[Row]:
    """Header and rows for the methods of ``results`` that somebody has claimed something about.

    Args:
        results: ``aggregated_results.json``.
        conditions: under which they were measured, in words.

    """
    table: list[Row] = [
        (
            "method",
            "expected by the authors",
            "published",
            "their conditions",
            "measured here",
            "conditions here",
        ),
    ]
    dense = next((e for e in results.values() if e["method"] == "dense"), None)
    for claim in EXPECTATIONS:
        entries = [(k, e) for k, e in results.items() if e["method"] == claim.method]
        if entries:
            measured = "; ".join(_beside(claim, key, entry, dense) for key, entry in entries)
            table.append(
                (
                    f"{claim.method} ({claim.source})",
                    _expected(claim),
                    claim.published,
                    claim.conditions,
                    measured,
                    conditions,
                )
            )
    return table


def _expected(claim: Expectation) -> str:
    told = [f"sparsity {sparsity}: {text}" for sparsity, text in claim.expected.items()]
    return "; ".join([*told, *([claim.beside] if claim.beside else [])]) or "-"


def _beside(
    claim: Expectation, key: str, entry: dict[str, Any], dense: dict[str, Any] | None
) -> str:
    """What was measured, or why it stands beside nothing that was expected."""
    name, effective = level(key, entry), entry["effective_sparsity"]
    exact = not differs(entry) and entry["sparsity"] > 0
    shown = name if exact else f"{name} (effective {effective:.3g})"
    if claim.expected and not any(abs(s - effective) < TOLERANCE + 1e-9 for s in claim.expected):
        return f"{shown}: left out, nothing was expected at this sparsity"
    return f"{shown}: {_measured(entry, dense)}"


def _measured(entry: dict[str, Any], dense: dict[str, Any] | None) -> str:
    text = f"perplexity {entry['perplexity']['mean']:.2f}"
    if dense is not None:
        text += f" ({change(entry['perplexity']['mean'], dense['perplexity']['mean'])})"
        text += f", {_ratio(entry, dense, 'peak_memory_mib'):.0%} of the KV memory"
        if ratio := entry.get("throughput", {}).get("against_dense"):
            once = " (one load)" if ratio["num_runs"] == 1 else ""
            text += f", {times(ratio, 'x')} throughput{once}"
    return text


def _ratio(entry: dict[str, Any], dense: dict[str, Any], metric: str) -> float:
    return entry[metric]["mean"] / dense[metric]["mean"]
