"""The runs of the study, and which server each needs. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from harness.errors import UsageError
from harness.records.specifications import DENSE
from vllm_plugins.policies import policy_names

NEEDLE, PASSAGES = "kv_needle", "kv_passages"
TASKS = (NEEDLE, PASSAGES)
"""Names of the files in ``tasks/`` and of the tasks in them."""
PLAIN = (DENSE, 0.0)
"""A server that evicts nothing unless a request asks for it."""


@dataclass(frozen=True)
class Run:
    """One run of lm-eval."""

    task: str
    method: str
    sparsity: float

    @property
    def name(self) -> str:
        """Of its record, without the ending."""
        return f"{self.task}_{self.method}_s{self.sparsity:g}"

    @property
    def server(self) -> tuple[str, float]:
        """Policy and sparsity of the server.

        Requests for text carry their own settings, so one server does for all of them. Requests
        for log-probs carry none: ``LocalCompletionsAPI._create_payload`` of lm-eval adds the
        user's fields to the former alone.
        """
        return PLAIN if self.task == NEEDLE else (self.method, self.sparsity)

    @property
    def request_settings(self) -> dict[str, Any]:
        """What each request carries in ``vllm_xargs``."""
        if self.task != NEEDLE or self.method == DENSE:
            return {}
        return {"kv_policy": self.method, "kv_sparsity": self.sparsity}


def planned(tasks: Sequence[str], methods: Sequence[str], sparsities: Sequence[float]) -> list[Run]:
    """All runs, those of one server side by side; ``dense`` is there once.

    Raises:
        UsageError: a sparsity or a method is none, or something is named twice.

    """
    for what, given in (("--tasks", tasks), ("--methods", methods), ("--sparsity", sparsities)):
        if len(set(given)) < len(given):
            raise UsageError(f"{what} names something twice; name it once")
    for sparsity in sparsities:
        if not 0 < sparsity < 1:
            raise UsageError(f"--sparsity {sparsity:g} must lie between 0 and 1")
    if unknown := sorted(set(methods) - {DENSE, *policy_names()}):
        raise UsageError(f"--methods {unknown[0]} is no policy; use {', '.join(policy_names())}")
    levels = [
        (method, sparsity)
        for method in methods
        for sparsity in ([0.0] if method == DENSE else sparsities)
    ]
    runs = [Run(task, *level) for task in tasks for level in levels]
    servers = list(dict.fromkeys(run.server for run in runs))
    return sorted(runs, key=lambda run: servers.index(run.server))


def by_server(runs: Sequence[Run]) -> Iterator[tuple[tuple[str, float], list[Run]]]:
    """Each server with its runs."""
    for server in dict.fromkeys(run.server for run in runs):
        yield server, [run for run in runs if run.server == server]


def serve_flags(
    server: tuple[str, float], *, name: str, context_length: int, score_chunk: int
) -> list[str]:
    """Flags of ``kv-eviction serve`` behind the model.

    Args:
        server: policy and sparsity.
        name: that the API calls the model by.
        context_length: tokens of the longest request.
        score_chunk: tokens of a step; eviction happens between two of them.

    """
    policy, sparsity = server
    return [
        *("--policy", policy, "--sparsity", f"{sparsity:g}"),
        *("--score-chunk", str(score_chunk), "--max-model-len", str(context_length)),
        *("--served-model-name", name, "--kv-cache-memory-bytes", str(2**30)),
        # The same prompts come again under other settings, and a hit would change their scores.
        "--no-enable-prefix-caching",
        # Compiling takes minutes, and so short a run gains nothing by it.
        "--enforce-eager",
    ]
