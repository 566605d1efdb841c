"""What the specification in a run's record says: which runs compare, and in what order. Pure."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from vllm_plugins.config import RequestSettings
from vllm_plugins.policies import policy_names

DENSE = "dense"
VARIED = ("method", "sparsity", "budget_tokens", "seed")
"""What differs between the runs of one comparison."""


def level(sparsity: float, budget_tokens: int | None) -> str:
    """How names of files and keys tell a budget: ``s0.9``, ``s0.0``, or ``b256`` for tokens."""
    return f"s{float(sparsity)}" if budget_tokens is None else f"b{budget_tokens}"


def comparison(specification: dict[str, Any]) -> str:
    """``RunSpecification.comparison`` of a record's specification."""
    return digest({k: v for k, v in specification.items() if k not in VARIED})


def effective_sparsity(specification: dict[str, Any]) -> float:
    """The sparsity that a run's settings come to, from the specification of its record.

    The plugin's own (``RequestSettings.effective_sparsity``), at the end of a window. Blocks are
    whole and at least ``min_blocks`` stay: 0.9 of 1,024 tokens in blocks of 32 is 0.875. A budget
    in tokens comes to a sparsity the same way. Dense: 0.
    """
    engine = specification["engine"]
    # A budget does not depend on the policy.
    settings = RequestSettings(
        DENSE, specification["sparsity"], specification.get("budget_tokens"), {}
    )
    return settings.effective_sparsity(
        engine["context_length"], engine["block_size"], engine["eviction"]["min_blocks"]
    )


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of ``value`` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def order(record: dict[str, Any]) -> tuple[Any, ...]:
    """Sort key of records: registered policies in order, then by name, level and seed."""
    known = policy_names()
    name = record["method"]
    rank = known.index(name) if name in known else len(known)
    budget = record["specification"].get("budget_tokens") or 0
    return rank, name, record["sparsity"], budget, record["seed"]
