"""What is read out of vLLM's outputs."""

from __future__ import annotations

import math
from typing import Any

from .scored import Answer, UnfaithfulRun


def own_log_probs(flat: Any) -> list[float]:
    """Log-prob of each position's own token: the first entry of ``FlatLogprobs`` there."""
    values = [*flat.logprobs, math.nan]  # a position without entries may lie at the end
    return [values[start] for start in flat.start_indices]


def answer_of(output: Any) -> Answer:
    """The answer of a request that has finished."""
    made = output.outputs[0]
    return Answer(
        token_ids=list(made.token_ids),
        text=made.text,
        ended=made.finish_reason == "stop",
        cached_tokens=output.num_cached_tokens or 0,
        record=record_of(output),
    )


def record_of(output: Any) -> dict[str, Any]:
    """The plugin's counters of a request; {} without it."""
    return (output.kv_transfer_params or {}).get("kv_eviction", {})


def check_policy(record: dict[str, Any]) -> None:
    """Refuse the record of a request that was not served by its policy.

    Raises:
        UnfaithfulRun: what the policy failed of.

    """
    for failure in ("policy_error", "refused_settings"):
        if failure in record:
            raise UnfaithfulRun(f"{failure}: {record[failure]}")
