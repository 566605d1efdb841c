"""The attention mass of a request that loses nothing, as the scheduler sees it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

BLOCK_SIZE = 16


def mass_by_step(engine: Any, prompt: list[int], num_decodes: int = 20) -> Iterator[float]:
    """Decode ``prompt`` alone; mass per scored query after each step past ``num_decodes`` ones."""
    from vllm import SamplingParams

    connector = engine.engine_core.engine_core.scheduler.connector
    params = SamplingParams(
        max_tokens=2 * num_decodes,
        ignore_eos=True,
        detokenize=False,
        extra_args={
            "kv_policy": "h2o",
            "kv_budget_tokens": 10**7,
            "kv_granularity": "block",
        },
    )
    engine.add_request("m", {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        engine.step()
        state = next(iter(connector.ledger.requests.values()), None)
        if state is None or state.num_scored_tokens < len(prompt) + num_decodes:
            continue
        scores = connector.ledger._scores["attention"]
        queries = state.num_scored_tokens
        (blocks,) = (b for b in connector._managers[0].req_to_blocks.values() if b)
        # The step in flight may hold one block more, still with its former owner's score.
        full = blocks[: -(-queries // BLOCK_SIZE)]
        yield float(sum(scores[block.block_id] for block in full)) / queries
