"""What the authors of a method expected of it and what they published: claims, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Bounds:
    """What was expected of a method at one sparsity."""

    perplexity: float
    """At most so much more than dense's, as a share: 0.04 is 4%."""
    memory: float
    """At most so large a share of dense's KV memory."""
    throughput: float
    """At least so many times stock's output tokens per second."""

    def __str__(self) -> str:
        return (
            f"perplexity +{100 * self.perplexity:g}%, {100 * self.memory:g}% of the memory, "
            f"{self.throughput:g}x throughput"
        )


@dataclass(frozen=True)
class Expectation:
    """Claims about a method with their conditions, from its paper."""

    method: str
    title: str
    """As the field writes the method's name."""
    source: str
    bounds: Mapping[float, Bounds] = field(default_factory=dict)
    """By sparsity; empty where the authors named none."""
    ahead_of: str = ""
    """The method that it was expected to beat at every budget."""
    published: str = "-"
    conditions: str = "-"


EXPECTATIONS = (
    Expectation(
        "h2o",
        "H2O",
        "Zhang et al., NeurIPS 2023, arXiv:2306.14048",
        {0.5: Bounds(0.04, 0.5, 2.0), 0.9: Bounds(0.25, 0.1, 8.0)},
        published="a fifth of the KV cache, heavy hitters and recent tokens, answers as well as "
        "all of it; up to 29x the throughput of DeepSpeed Zero-Inference and Accelerate, 3x of "
        "FlexGen; latency at one batch size up to 1.9x lower",
        conditions="OPT-6.7B and OPT-30B, offloading, tokens evicted one by one while decoding",
    ),
    Expectation(
        "streaming",
        "StreamingLLM",
        "Xiao et al., ICLR 2024, arXiv:2309.17453",
        published="the first tokens and a recent window keep perplexity stable at any length: "
        "perplexity 5.40, as a sliding window recomputed at every token (5.43)",
        conditions="Llama-2-13B, first book of PG-19's test split (65K tokens), 4 sinks + 1,020 "
        "recent tokens, positions counted within the cache",
    ),
    Expectation(
        "cab",
        "CAB",
        "curvature-aware budget; no publication with figures is known",
        {0.5: Bounds(0.025, 0.5, 2.0), 0.9: Bounds(0.17, 0.1, 8.0)},
        ahead_of="h2o",
    ),
)
