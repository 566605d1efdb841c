"""vLLM as a steady load needs it, in the engine's own process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .eviction_summary import summary
from .steady_loop import Gauges, Progress
from .steady_requests import DrawnRequest
from .step_profile import split_of_steps

_LAST_STEPS = 16
"""At most so many steps hand the last aborted request's memory back."""


class VllmSteadyEngine:
    """A ``steady_loop.SteadyEngine``.

    Args:
        llm: a ``vllm.LLM`` whose engine runs in this process.
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
        self._engine = llm.llm_engine
        self._core = self._engine.engine_core.engine_core
        self._pool = self._core.scheduler.kv_cache_manager.block_pool
        self._settings = settings
        self._open: set[str] = set()
        self._records: list[dict[str, Any]] = []
        self.counters = counters
        self.vocabulary = self._engine.model_config.get_vocab_size()
        self.kv_cache_tokens = kv_cache_tokens
        self.kv_blocks = self._pool.num_gpu_blocks - 1  # one is the null block

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
        """One step of vLLM."""
        made = []
        for output in self._engine.step():
            new_tokens = len(output.outputs[0].token_ids)
            made.append(Progress(int(output.request_id), new_tokens, output.finished))
            if output.finished:
                self._open.discard(output.request_id)
                self._records.append((output.kv_transfer_params or {}).get("kv_eviction", {}))
        return made

    def gauges(self) -> Gauges:
        """After the last step."""
        used = self.kv_blocks - self._pool.get_num_free_blocks()
        return Gauges(len(self._core.scheduler.running), used)

    def eviction(self) -> dict[str, Any] | None:
        """Over the requests that have ended; None without the plugin."""
        return summary(self._records)

    def split(self, step: Callable[[], Any]) -> dict[str, float] | None:
        """Of a few steps, see ``split_of_steps``; None on a CPU."""
        device = self._engine.vllm_config.device_config.device_type
        return split_of_steps(step) if device == "cuda" else None

    def stop(self) -> None:
        """Abort what is left, and let the engine put away what was in flight."""
        self._engine.abort_request(sorted(self._open))
        self._open.clear()
        for _ in range(_LAST_STEPS):
            if not (self._core.scheduler.has_requests() or self._core.batch_queue):
                break
            self._engine.step()
