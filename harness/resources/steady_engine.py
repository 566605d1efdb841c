"""vLLM as a steady load needs it: its core in a process of its own, seen through its outputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from .eviction_summary import summary
from .host_profile import host_of_steps
from .steady_loop import Gauges, Progress
from .steady_requests import DrawnRequest
from .step_profile import split_of_steps

GAUGES_EVERY_S = 0.1
"""Reading them takes milliseconds, which are this process's and not the engine's."""
_RUNNING, _USAGE = "vllm:num_requests_running", "vllm:kv_cache_usage_perc"


class VllmSteadyEngine:
    """A ``steady_loop.SteadyEngine``.

    Args:
        llm: a ``vllm.LLM``.
        kv_cache_tokens: what its pool holds without eviction.
        settings: of every request, ``SamplingParams.extra_args``.
        counters: the engine's, so far.

    """

    def __init__(
        self,
        llm: Any,
        kv_cache_tokens: int,
        settings: dict[str, Any],
        counters: Callable[[], dict[str, Any]],
    ) -> None:
        self._llm, self._engine = llm, llm.llm_engine
        self._settings = settings
        self._open: set[str] = set()
        self._records: list[dict[str, Any]] = []
        self._gauges, self._gauges_read = Gauges(0, 0), float("-inf")
        self.counters = counters
        self.vocabulary = self._engine.model_config.get_vocab_size()
        self.kv_cache_tokens = kv_cache_tokens
        # One is the null block.
        self.kv_blocks = self._engine.vllm_config.cache_config.num_gpu_blocks - 1

    def add(self, number: int, request: DrawnRequest) -> None:
        """Queue a request."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=request.output_tokens,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            extra_args=self._settings or None,
            # Else every step brings all tokens of every request.
            output_kind=RequestOutputKind.DELTA,
        )
        self._engine.add_request(str(number), {"prompt_token_ids": request.prompt}, params)
        self._open.add(str(number))

    def step(self) -> Sequence[Progress]:
        """What one step of vLLM's core brought."""
        made = []
        for output in self._engine.step():
            new_tokens = len(output.outputs[0].token_ids)
            made.append(Progress(int(output.request_id), new_tokens, output.finished))
            if output.finished:
                self._open.discard(output.request_id)
                self._records.append((output.kv_transfer_params or {}).get("kv_eviction", {}))
        return made

    def gauges(self) -> Gauges:
        """After the last step, or ``GAUGES_EVERY_S`` before."""
        now = time.monotonic()
        if now - self._gauges_read >= GAUGES_EVERY_S:
            known = {m.name: m.value for m in self._llm.get_metrics() if hasattr(m, "value")}
            used = round(known[_USAGE] * self.kv_blocks)
            self._gauges, self._gauges_read = Gauges(int(known[_RUNNING]), used), now
        return self._gauges

    def eviction(self) -> dict[str, Any] | None:
        """Over the requests that have ended; None without the plugin."""
        return summary(self._records)

    def host(self, step: Callable[[], Any]) -> dict[str, float] | None:
        """Of some steps, see ``host_of_steps``."""
        return host_of_steps(step, self._llm.collective_rpc)

    def split(self, step: Callable[[], Any]) -> dict[str, float] | None:
        """Of a few steps, see ``split_of_steps``; None on a CPU."""
        device = self._engine.vllm_config.device_config.device_type
        return split_of_steps(step, self._llm.collective_rpc) if device == "cuda" else None

    def stop(self) -> None:
        """Abort what is left; the core puts away what was in flight before the next request."""
        self._engine.abort_request(sorted(self._open))
        self._open.clear()
