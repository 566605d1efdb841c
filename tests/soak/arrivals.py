"""The requests of a round, drawn: prompts that share, every policy, and settings that are wrong."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_plugins.policies import get_policy, policy_names
from vllm_plugins.policies.cab import BRIDGES
from vllm_plugins.policies.token_rules import SELECTIONS

from ..engine.traffic import forms_of

VOCABULARY = 256
NUM_ROOTS = 3
ROOT_TOKENS = 400
LONGEST_PROMPT = 700
LONGEST_ANSWER = 120
WRONG = (
    ({"kv_policy": "h20"}, "unknown policy 'h20'"),
    ({"kv_policy": "h2o", "kv_sparsity": 1.0}, "give a number from 0"),
    ({"kv_policy": "h2o", "kv_budget_tokens": 40}, "give at least 64"),
    ({"kv_sparsty": 0.5}, "did you mean 'kv_sparsity'"),
    ({"kv_policy": "tova", "kv_granularity": "block"}, "no form at block granularity"),
    ({"kv_policy": "cab", "kv_policy_args": {"local": 0.9}}, "sum to 1"),
)
"""Settings, and what the refusal says."""


def draw_tokens(rng: np.random.Generator, number: int) -> list[int]:
    return rng.integers(0, VOCABULARY, size=number).tolist()


def draw_settings(rng: np.random.Generator) -> dict[str, Any]:
    """Of a request: any policy and form, any budget, and at times parameters of its own."""
    policy = str(rng.choice(policy_names()))
    if not get_policy(policy).evicts:
        return {"kv_policy": policy}
    granularity = str(rng.choice(forms_of(policy)))
    settings: dict[str, Any] = {"kv_policy": policy, "kv_granularity": granularity}
    if rng.random() < 0.2:
        settings["kv_budget_tokens"] = 32 * int(rng.integers(4, 12))
    else:
        settings["kv_sparsity"] = float(rng.choice([0.0, 0.3, 0.5, 0.7, 0.9]))
    arguments: dict[str, Any] = {}
    if policy == "cab" and rng.random() < 0.5:
        arguments["bridge_definition"] = str(rng.choice(BRIDGES[granularity]))
    if policy in ("h2o", "cab") and granularity == "token" and rng.random() < 0.5:
        arguments["selection"] = str(rng.choice(SELECTIONS))
        arguments["value_weighted"] = bool(rng.random() < 0.5)
    return {**settings, "kv_policy_args": arguments} if arguments else settings


class Arrivals:
    """Draws the requests of one round, each by ``draw``.

    Args:
        rng: of the round.
        outputs: by name, what has been answered so far; a chat goes on from there.
        num_priorities: requests get one of so many.

    """

    def __init__(
        self, rng: np.random.Generator, outputs: dict[str, Any], num_priorities: int
    ) -> None:
        self._rng = rng
        self._outputs = outputs
        self._num_priorities = num_priorities
        self._roots = [draw_tokens(rng, ROOT_TOKENS) for _ in range(NUM_ROOTS)]
        self.drawn: dict[str, dict[str, Any]] = {}

    def draw(self, place: int) -> dict[str, Any]:
        """The arguments of ``traffic.add`` after the name of the ``place``-th request."""
        rng = self._rng
        request: dict[str, Any] = {
            "tokens": self._prompt(),
            "extra": draw_settings(rng),
            "max_tokens": int(rng.integers(1, LONGEST_ANSWER)),
            "priority": int(rng.integers(self._num_priorities)),
        }
        if rng.random() < 0.1:
            # Without a seed: on a CPU vLLM cannot sample by one while a prompt comes in chunks.
            request |= {"n": int(rng.integers(2, 4)), "temperature": 1.0}
        self.drawn[f"r{place}"] = request
        return request

    def _prompt(self) -> list[int]:
        """A root's beginning and more, an earlier prompt with its answer and more, or new."""
        rng = self._rng
        kind, own = rng.random(), draw_tokens(rng, int(rng.integers(1, 100)))
        if kind < 0.5:
            root = self._roots[rng.integers(NUM_ROOTS)]
            return root[: rng.integers(1, ROOT_TOKENS)] + own
        chats = [name for name, request in self.drawn.items() if "n" not in request]
        chats = [name for name in chats if name in self._outputs]
        if kind < 0.75 and chats:
            output = self._outputs[str(rng.choice(chats))]
            before = [*output.prompt_token_ids, *output.outputs[0].token_ids]
            if len(before) + len(own) <= LONGEST_PROMPT:
                return before + own
        return draw_tokens(rng, int(rng.integers(1, LONGEST_PROMPT)))
