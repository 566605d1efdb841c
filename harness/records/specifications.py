"""What the specification in a run's record says: which runs compare, and in what order. Pure."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from vllm_plugins.policies import policy_names
from vllm_plugins.request_settings import BLOCK, RequestSettings

DENSE = "dense"
STOCK = "stock"
"""vLLM without the plugin."""
PERPLEXITY, THROUGHPUT, SERVING = "perplexity", "throughput", "serving"
BATCH, STEADY, TASK = "batch", "steady", "task"
"""Kinds of records."""
VARIED = ("method", "policy", "args", "sparsity", "budget_tokens", "seed", "task")
"""What differs between the runs of one comparison."""


def level(sparsity: float, budget_tokens: int | None) -> str:
    """How names of files and keys tell a budget: ``s0.9``, ``s0.0``, or ``b256`` for tokens."""
    return f"s{float(sparsity)}" if budget_tokens is None else f"b{budget_tokens}"


def comparison(specification: dict[str, Any]) -> str:
    """``Run.comparison`` of a record's specification."""
    return digest({k: v for k, v in specification.items() if k not in VARIED})


def effective_sparsity(
    sparsity: float, budget_tokens: int | None, num_tokens: int, block_size: int, min_blocks: int
) -> float:
    """The sparsity that a budget comes to, at the end of a request of ``num_tokens``.

    The plugin's own (``RequestSettings.effective_sparsity``). Blocks are whole and at least
    ``min_blocks`` stay: 0.9 of 1,024 tokens in blocks of 32 is 0.875. A budget in tokens comes to
    a sparsity the same way. Dense: 0.
    """
    # A budget does not depend on the policy.
    settings = RequestSettings(DENSE, sparsity, budget_tokens, {}, BLOCK)
    return settings.effective_sparsity(num_tokens, block_size, min_blocks)


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of ``value`` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def order(record: dict[str, Any]) -> tuple[Any, ...]:
    """Sort key of records: registered policies in order, then by name, level and seed."""
    known = [STOCK, *policy_names()]
    name = record["method"]
    rank = known.index(name) if name in known else len(known)
    return rank, name, record["sparsity"], record["budget_tokens"] or 0, record["seed"]
